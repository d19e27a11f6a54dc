//! Answers of a server that speaks OpenAI's API: vLLM, llama.cpp, and most others.
//!
//! In: requests, and where the server is. Out: its answers, by a number of threads that have one request each on its way. A request that fails
//! for a passing reason (no connection, no time, status 429 or 5xx) is tried again after a wait; any other failure ends the work.
//!
//! Answers are asked for greedily, which makes them neither the same on another server nor quite the same on the next day: batches and caches
//! change the order of sums. What weights the server computes with, nobody here can tell.

mod address;
mod completion;
mod retry;

use std::fmt;
use std::io::Read;
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;
use ureq::http::Response;
use ureq::http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{Answer, AnswerError, Answerer, Each};
use crate::data::Request;
use completion::message;
use retry::{Clock, LONGEST_ASKED, Real, Waits, retry_after};

pub use address::{Address, AddressError, ApiKey, MalformedApiKey};
pub use completion::{Form, MalformedAnswer};

/// Where a server is, and how it is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EndpointSettings {
    /// Where it is.
    pub address: Address,
    /// Which of its models is asked; without one, the server chooses, and answers kept from another of its models are not told apart.
    pub model: Option<String>,
    /// What it knows its user by. Sent to this address alone: redirections are not followed.
    pub api_key: Option<ApiKey>,
    /// How a request is put to it.
    pub form: Form,
    /// Requests on their way at once, at least 1.
    pub concurrency: usize,
    /// Tries after the first of each request, while it fails for a passing reason.
    pub retries: u32,
    /// How long one try may take, from connecting to the answer's last byte.
    pub timeout: Duration,
    /// Whether the work is to stop: asked several times a second, so that nobody has to wait for an answer that is slow.
    pub asked_to_stop: fn() -> bool,
}

impl EndpointSettings {
    /// Chat turns, the server's own model, no key, 8 requests at once, 6 tries after the first, 10 minutes for each.
    pub fn to(address: Address) -> Self {
        Self {
            address,
            model: None,
            api_key: None,
            form: Form::Chat,
            concurrency: 8,
            retries: 6,
            timeout: Duration::from_secs(600),
            asked_to_stop: || false,
        }
    }
}

/// A server that answers.
pub struct Endpoint {
    settings: EndpointSettings,
    agent: Agent,
    clock: Arc<dyn Clock>,
}

impl Endpoint {
    /// The server that `settings` name, which is not asked anything yet.
    ///
    /// Over TLS it is trusted by the machine's certificates (or those that `SSL_CERT_FILE` names), and where there are none, by Mozilla's. A
    /// proxy is used if the environment names one (`HTTPS_PROXY` and others), except to this machine.
    pub fn new(settings: EndpointSettings) -> Self {
        let agent = agent(&settings);
        Self {
            settings,
            agent,
            clock: Arc::new(Real),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Answerer for Endpoint {
    /// The address, the model's name and the form; not the key.
    fn identity(&self) -> String {
        let EndpointSettings {
            address,
            model,
            form,
            ..
        } = &self.settings;
        let model = match model {
            Some(model) => format!("model {model:?}"),
            None => "its own model".to_owned(),
        };
        format!("server {address}, {model}, {}", form.identity())
    }

    /// When the work stops early, answers that are on their way are lost, and nobody waits for them.
    fn answer(
        &mut self,
        requests: &[&Request],
        max_new_tokens: usize,
        each: &mut Each<'_>,
    ) -> Result<(), AnswerError> {
        let asking = |request: &&Request| self.settings.form.asking(request);
        let asking: Vec<Value> = requests.iter().map(asking).collect::<Result<_, _>>()?;
        let mut left = asking.len();
        let workers = Workers::start(Work {
            settings: self.settings.clone(),
            agent: self.agent.clone(),
            clock: Arc::clone(&self.clock),
            asking,
            max_new_tokens,
            next: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        while left > 0 {
            if (self.settings.asked_to_stop)() {
                return Err(AnswerError::Interrupted);
            }
            match workers.found.recv_timeout(BETWEEN_LOOKS) {
                Ok((place, Ok(answer))) => {
                    left -= 1;
                    if each(place, answer).is_break() {
                        return Err(AnswerError::Interrupted);
                    }
                }
                Ok((place, Err(source))) => {
                    let source = Box::new(source);
                    return Err(AnswerError::Server { place, source });
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Only a panic ends a worker while there is something left.
                Err(RecvTimeoutError::Disconnected) => workers.resume_panic(),
            }
        }
        Ok(())
    }
}

/// Why a server gives no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// A server that cannot be reached, does not answer in time, or breaks off.
    #[error("the exchange with the server failed{}", after(*tries))]
    Exchange {
        /// How often the request was tried.
        tries: u32,
        /// What failed in the end.
        source: ureq::Error,
    },
    /// A successful response without an answer in it.
    #[error("the server's answer cannot be used")]
    Malformed(#[source] MalformedAnswer),
    /// A server that asks for more patience than it is given.
    #[error(
        "the server answers {status} and asks to wait for {asked:?}, which is more than the {most:?} that it is waited for: {message}"
    )]
    OutOfPatience {
        /// The HTTP status.
        status: u16,
        /// How long it asks to wait.
        asked: Duration,
        /// How long it is waited for.
        most: Duration,
        /// What it says, cut to a length that can be shown.
        message: String,
    },
    /// A status that is not success.
    #[error("the server answers {status}{}: {message}", after(*tries))]
    Status {
        /// The HTTP status.
        status: u16,
        /// How often the request was tried.
        tries: u32,
        /// What it says, cut to a length that can be shown.
        message: String,
    },
    /// A response that does not end where an answer would.
    #[error("the response is larger than {limit} bytes")]
    TooLarge {
        /// Bytes that are read at most.
        limit: u64,
    },
}

/// A phrase for a number of tries.
fn after(tries: u32) -> String {
    match tries {
        0 | 1 => String::new(),
        _ => format!(" after {tries} tries"),
    }
}

/// What became of the request at a place.
type Found = (usize, Result<Answer, ServerError>);

/// Threads that work. Dropping it tells them to stop and does not wait: one may be in a request for minutes still.
struct Workers {
    work: Arc<Work>,
    found: Receiver<Found>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    fn start(work: Work) -> Self {
        let count = work.settings.concurrency.max(1).min(work.asking.len());
        let work = Arc::new(work);
        let (sender, found) = channel();
        let start = |_| {
            let (work, sender) = (Arc::clone(&work), sender.clone());
            thread::spawn(move || work.run(&sender))
        };
        let threads = (0..count).map(start).collect();
        Self {
            work,
            found,
            threads,
        }
    }

    /// Goes on with the panic that ended a worker.
    fn resume_panic(mut self) -> ! {
        for thread in self.threads.drain(..) {
            if let Err(reason) = thread.join() {
                panic::resume_unwind(reason);
            }
        }
        unreachable!("a worker ends without a panic only when nothing is left to do");
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.work.stopped.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            thread.thread().unpark();
        }
    }
}

/// What is to be done, shared by those who do it.
struct Work {
    settings: EndpointSettings,
    agent: Agent,
    clock: Arc<dyn Clock>,
    /// What is asked, by place.
    asking: Vec<Value>,
    max_new_tokens: usize,
    /// The first place that nobody has taken.
    next: AtomicUsize,
    stopped: AtomicBool,
}

impl Work {
    /// One thread's share: takes places until there are none.
    fn run(&self, sender: &Sender<Found>) {
        while !self.stopped() {
            let place = self.next.fetch_add(1, Ordering::SeqCst);
            let Some(asking) = self.asking.get(place) else {
                return;
            };
            let Some(found) = self.answer(place, asking) else {
                return;
            };
            if sender.send((place, found)).is_err() {
                return;
            }
        }
    }

    /// None when the work was stopped before there is an answer.
    fn answer(&self, place: usize, asking: &Value) -> Option<Result<Answer, ServerError>> {
        let settings = &self.settings;
        let model = settings.model.as_deref();
        let body = settings.form.body(model, asking, self.max_new_tokens);
        let mut waits = Waits::of(place);
        let mut tries = 0;
        loop {
            tries += 1;
            let failure = match self.exchange(&body, tries) {
                Ok(answer) => return Some(Ok(answer)),
                Err(failure) => failure,
            };
            let asked = match failure.passing {
                Passing::Yes { asked } if tries <= settings.retries => asked,
                _ => return Some(Err(failure.error)),
            };
            self.clock.sleep(waits.next(asked), &self.stopped);
            if self.stopped() {
                return None;
            }
        }
    }

    /// One try.
    fn exchange(&self, body: &[u8], tries: u32) -> Result<Answer, Failure> {
        let settings = &self.settings;
        let failed = |error: ureq::Error| Failure::exchange(error, tries);
        let url = settings.address.join(settings.form.path());
        let mut request = self
            .agent
            .post(url)
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &settings.api_key {
            request = request.header(AUTHORIZATION, key.header());
        }
        let mut response = request.send(body).map_err(failed)?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refused(response, tries));
        }
        let mut bytes = Vec::new();
        response
            .body_mut()
            .as_reader()
            .take(ANSWER_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| failed(error.into()))?;
        if bytes.len() as u64 > ANSWER_BYTES {
            let limit = ANSWER_BYTES;
            return Err(Failure::lasting(ServerError::TooLarge { limit }));
        }
        settings
            .form
            .answer(&bytes, settings.api_key.as_ref())
            .map_err(|error| Failure::lasting(ServerError::Malformed(error)))
    }

    /// What a response says that is not success.
    fn refused(&self, mut response: Response<Body>, tries: u32) -> Failure {
        let mut said = Vec::new();
        // What can be read of it has to do.
        let _ = response
            .body_mut()
            .as_reader()
            .take(MESSAGE_BYTES)
            .read_to_end(&mut said);
        let message = message(&said, self.settings.api_key.as_ref());
        let status = response.status();
        let error = ServerError::Status {
            status: status.as_u16(),
            tries,
            message: message.clone(),
        };
        if status.as_u16() != 429 && !status.is_server_error() {
            return Failure::lasting(error);
        }
        let asked = response.headers().get(RETRY_AFTER);
        let asked = asked
            .and_then(|value| value.to_str().ok())
            .and_then(|value| retry_after(value, self.clock.now()));
        match asked {
            Some(asked) if asked > LONGEST_ASKED => Failure::lasting(ServerError::OutOfPatience {
                status: status.as_u16(),
                asked,
                most: LONGEST_ASKED,
                message,
            }),
            _ => Failure {
                error,
                passing: Passing::Yes { asked },
            },
        }
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

/// A try without an answer.
struct Failure {
    error: ServerError,
    passing: Passing,
}

/// Whether another try may fare better.
enum Passing {
    /// It may, after the wait that the server asks for.
    Yes {
        /// None if it asks for nothing.
        asked: Option<Duration>,
    },
    /// It will fail as this one did.
    No,
}

impl Failure {
    fn lasting(error: ServerError) -> Self {
        Self {
            error,
            passing: Passing::No,
        }
    }

    fn exchange(source: ureq::Error, tries: u32) -> Self {
        use std::io::ErrorKind;
        let passing = match &source {
            // So are certificates that are not trusted.
            ureq::Error::Io(error) if error.kind() == ErrorKind::InvalidData => Passing::No,
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::ConnectionFailed
            | ureq::Error::ConnectProxyFailed(_)
            | ureq::Error::Protocol(_) => Passing::Yes { asked: None },
            _ => Passing::No,
        };
        Self {
            error: ServerError::Exchange { tries, source },
            passing,
        }
    }
}

fn agent(settings: &EndpointSettings) -> Agent {
    let mut config = Agent::config_builder()
        .user_agent(concat!("panacea-patch/", env!("CARGO_PKG_VERSION")))
        .http_status_as_error(false)
        // A redirection may lead anywhere, and turns the request into one without a body.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_idle_connections_per_host(settings.concurrency.max(1))
        .max_idle_connections(settings.concurrency.max(1))
        .timeout_global(Some(settings.timeout));
    if settings.address.is_here() {
        config = config.proxy(None);
    }
    if settings.address.is_encrypted() {
        let found = rustls_native_certs::load_native_certs().certs;
        if !found.is_empty() {
            let of_machine = found.iter().map(|it| Certificate::from_der(it).to_owned());
            let tls = TlsConfig::builder().root_certs(RootCerts::from(of_machine));
            config = config.tls_config(tls.build());
        }
    }
    config.build().into()
}

/// How long the work goes on at most after it was asked to stop.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Bytes of a response with an answer at most: an answer of 100 000 tokens with all that servers put around it.
const ANSWER_BYTES: u64 = 4 << 20;

/// Bytes of a response that is an error that are read.
const MESSAGE_BYTES: u64 = 16 << 10;

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
