//! Against a server of the tests' own on 127.0.0.1, and a clock that says how long it was asked to wait and does not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::sync::{Barrier, Mutex};
use std::time::SystemTime;

use serde_json::{Value, json};

use super::*;
use crate::data::Template;
use crate::eval::journal::{Journal, JournalError};

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    /// Names in lower case.
    headers: BTreeMap<String, String>,
    body: Value,
    /// How often this text was asked before.
    before: usize,
}

impl Seen {
    /// What is asked.
    fn text(&self) -> &str {
        let turn = self.body["messages"][0]["content"].as_str();
        turn.or(self.body["prompt"].as_str()).unwrap()
    }
}

/// What the server does.
enum Reply {
    /// Answers in full: status, further header lines, body.
    Say(u16, &'static str, String),
    /// Closes the connection without a word.
    Close,
    /// Begins an answer, and closes the connection in the middle.
    BreakOff,
    /// Says nothing until the other side gives up.
    Hold,
}

/// An answer that came to its end.
fn says(text: &str) -> Reply {
    let choice = json!({"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "stop"});
    Reply::Say(200, "", json!({ "choices": [choice] }).to_string())
}

fn fails(status: u16, header: &'static str, message: &str) -> Reply {
    let body = json!({"error": {"message": message, "type": "test"}});
    Reply::Say(status, header, body.to_string())
}

/// A server for as long as the tests run.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (reply, all) = (Arc::new(reply), Arc::clone(&seen));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (reply, all) = (Arc::clone(&reply), Arc::clone(&all));
                thread::spawn(move || exchange(&stream.unwrap(), &*reply, &all));
            }
        });
        Self { address, seen }
    }

    fn settings(&self) -> EndpointSettings {
        EndpointSettings::to(format!("http://{}", self.address).parse().unwrap())
    }

    /// What was asked, sorted.
    fn texts(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        let mut texts: Vec<String> = seen.iter().map(|it| it.text().to_owned()).collect();
        texts.sort();
        texts
    }

    fn one(&self) -> Seen {
        let seen = self.seen.lock().unwrap();
        assert_eq!(seen.len(), 1);
        seen[0].clone()
    }
}

/// One request of a connection, and the reply.
fn exchange(stream: &TcpStream, reply: &dyn Fn(&Seen) -> Reply, all: &Mutex<Vec<Seen>>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let Some(path) = line.split(' ').nth(1).map(str::to_owned) else {
        return;
    };
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; headers["content-length"].parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    let mut seen = Seen {
        path,
        headers,
        body: serde_json::from_slice(&body).unwrap(),
        before: 0,
    };
    {
        let mut all = all.lock().unwrap();
        seen.before = all.iter().filter(|it| it.text() == seen.text()).count();
        all.push(seen.clone());
    }
    // The other side may be gone already.
    let _ = match reply(&seen) {
        Reply::Say(status, header, body) => write_reply(stream, status, header, &body),
        Reply::Close => Ok(()),
        Reply::BreakOff => {
            let mut stream = stream;
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{{\"choices\":["
            )
        }
        Reply::Hold => reader.read_to_end(&mut body).map(|_| ()),
    };
}

fn write_reply(
    mut stream: &TcpStream,
    status: u16,
    header: &str,
    body: &str,
) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nConnection: close\r\n{header}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Keeps what it was asked to wait.
#[derive(Debug, Default)]
struct Kept(Mutex<Vec<Duration>>);

impl Clock for Kept {
    fn now(&self) -> SystemTime {
        // Sun, 06 Nov 1994 08:49:37 GMT
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    fn sleep(&self, duration: Duration, _stopped: &AtomicBool) {
        self.0.lock().unwrap().push(duration);
    }
}

fn endpoint(settings: EndpointSettings) -> (Endpoint, Arc<Kept>) {
    let clock = Arc::new(Kept::default());
    let mut endpoint = Endpoint::new(settings);
    endpoint.clock = Arc::<Kept>::clone(&clock);
    (endpoint, clock)
}

fn requests(texts: &[&str]) -> Vec<Request> {
    texts.iter().map(|&text| Request::new(text)).collect()
}

/// The answers to `texts`, by place.
fn ask(endpoint: &mut Endpoint, texts: &[&str]) -> Result<BTreeMap<usize, Answer>, AnswerError> {
    let requests = requests(texts);
    let mut found = BTreeMap::new();
    endpoint.answer(
        &requests.iter().collect::<Vec<_>>(),
        5,
        &mut |place, answer| {
            assert!(found.insert(place, answer).is_none());
            ControlFlow::Continue(())
        },
    )?;
    Ok(found)
}

/// Why the server has no answer to one request, and how long was waited.
fn refusal(
    settings: EndpointSettings,
    reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> (ServerError, Vec<Duration>, usize) {
    let server = Server::start(reply);
    let (mut endpoint, clock) = endpoint(EndpointSettings {
        address: server.settings().address,
        ..settings
    });
    match ask(&mut endpoint, &["q"]) {
        Err(AnswerError::Server { place: 0, source }) => {
            let waits = clock.0.lock().unwrap().clone();
            (*source, waits, server.texts().len())
        }
        other => panic!("{other:?}"),
    }
}

fn any() -> EndpointSettings {
    EndpointSettings::to("http://localhost".parse().unwrap())
}

#[test]
fn each_request_has_its_own_answer() {
    let server = Server::start(|seen| says(&format!("re {}", seen.text())));
    let (mut endpoint, clock) = endpoint(server.settings());
    let texts: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let found = ask(&mut endpoint, &texts).unwrap();
    for (place, answer) in &found {
        assert_eq!(
            (answer.text.as_str(), answer.ended),
            (format!("re {place}").as_str(), true)
        );
    }
    assert_eq!(found.len(), 20);
    assert!(clock.0.lock().unwrap().is_empty());
    assert!(ask(&mut endpoint, &[]).unwrap().is_empty());
}

#[test]
fn a_chat_is_asked_for_with_the_key_and_the_models_name() {
    let server = Server::start(|_| says("a"));
    let (mut endpoint, _) = endpoint(EndpointSettings {
        model: Some("m".to_owned()),
        api_key: Some("sk-one".parse().unwrap()),
        ..server.settings()
    });
    assert!(!format!("{endpoint:?}").contains("sk-one"));
    assert!(!endpoint.identity().contains("sk-one"));
    ask(&mut endpoint, &["q"]).unwrap();
    let seen = server.one();
    assert_eq!(seen.path, "/v1/chat/completions");
    assert_eq!(seen.headers["authorization"], "Bearer sk-one");
    assert_eq!(seen.headers["content-type"], "application/json");
    assert_eq!(seen.body["model"], "m");
    assert_eq!(seen.body["max_tokens"], 5);
}

#[test]
fn a_prompt_is_asked_for_with_the_template_in_it() {
    let server = Server::start(|_| says("a"));
    let (mut endpoint, _) = endpoint(EndpointSettings {
        form: Form::Prompt(Template::Alpaca),
        ..server.settings()
    });
    ask(&mut endpoint, &["q"]).unwrap();
    let seen = server.one();
    assert_eq!(seen.path, "/v1/completions");
    assert!(seen.text().ends_with("### Response:\n"));
    assert!(!seen.headers.contains_key("authorization"));
}

#[test]
fn as_many_requests_are_on_their_way_as_may_be_and_no_more() {
    let now = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    // Nobody gets on before three are in.
    let barrier = Barrier::new(3);
    let (inside, counted) = (Arc::clone(&now), Arc::clone(&most));
    let server = Server::start(move |_| {
        counted.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        barrier.wait();
        // Time for one more to come, if there were one.
        thread::sleep(Duration::from_millis(20));
        inside.fetch_sub(1, Ordering::SeqCst);
        says("a")
    });
    let (mut endpoint, _) = endpoint(EndpointSettings {
        concurrency: 3,
        ..server.settings()
    });
    let texts = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
    assert_eq!(ask(&mut endpoint, &texts).unwrap().len(), 9);
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn what_fails_for_a_passing_reason_is_tried_again_after_longer_and_longer_waits() {
    let server = Server::start(|seen| match seen.before {
        0 => fails(500, "", "inside"),
        1 => Reply::Close,
        2 => Reply::BreakOff,
        3 => fails(429, "Retry-After: 90\r\n", "busy"),
        4 => fails(
            503,
            "Retry-After: Sun, 06 Nov 1994 08:50:47 GMT\r\n",
            "loading",
        ),
        _ => says("a"),
    });
    let (mut endpoint, clock) = endpoint(server.settings());
    assert_eq!(ask(&mut endpoint, &["q"]).unwrap()[&0].text, "a");
    let waits = clock.0.lock().unwrap().clone();
    let seconds = Duration::from_secs;
    assert_eq!(waits.len(), 5, "{waits:?}");
    for (wait, whole) in waits.iter().zip([1, 2, 4]) {
        assert!(
            *wait <= seconds(whole) && *wait >= seconds(whole) / 2,
            "{waits:?}"
        );
    }
    assert_eq!(waits[3..], [seconds(90), seconds(70)]);
}

#[test]
fn what_goes_on_failing_is_given_up() {
    let settings = EndpointSettings {
        retries: 2,
        ..any()
    };
    let (error, waits, asked) = refusal(settings, |_| fails(502, "", "gone"));
    assert_eq!(
        error.to_string(),
        "the server answers 502 after 3 tries: gone"
    );
    assert_eq!((waits.len(), asked), (2, 3));
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let settings = EndpointSettings {
        retries: 1,
        timeout: Duration::from_millis(50),
        ..any()
    };
    let (error, waits, asked) = refusal(settings, |_| Reply::Hold);
    assert!(
        matches!(
            error,
            ServerError::Exchange {
                tries: 2,
                source: ureq::Error::Timeout(_)
            }
        ),
        "{error:?}"
    );
    // On a busy machine the time may be up before the server has read the request.
    assert_eq!(waits.len(), 1);
    assert!(asked <= 2);
}

#[test]
fn nobody_at_the_address_is_asked_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (mut endpoint, clock) = endpoint(EndpointSettings {
        retries: 3,
        ..EndpointSettings::to(format!("http://{address}").parse().unwrap())
    });
    let error = ask(&mut endpoint, &["q"]).unwrap_err();
    let AnswerError::Server { source, .. } = error else {
        panic!("{error:?}");
    };
    assert!(
        matches!(*source, ServerError::Exchange { tries: 4, .. }),
        "{source:?}"
    );
    assert_eq!(clock.0.lock().unwrap().len(), 3);
}

#[test]
fn what_will_go_on_failing_is_not_tried_again() {
    let (error, waits, asked) = refusal(any(), |_| fails(404, "", "no such model"));
    assert_eq!(error.to_string(), "the server answers 404: no such model");
    assert_eq!((waits.len(), asked), (0, 1));

    let to_elsewhere = "Location: http://127.0.0.1:1/\r\n";
    let (error, _, asked) = refusal(any(), move |_| fails(307, to_elsewhere, "over there"));
    assert_eq!(error.to_string(), "the server answers 307: over there");
    assert_eq!(asked, 1);

    let (error, waits, _) = refusal(any(), |_| fails(429, "Retry-After: 301\r\n", "tomorrow"));
    assert!(
        matches!(error, ServerError::OutOfPatience { status: 429, asked, .. } if asked == Duration::from_secs(301))
    );
    assert!(waits.is_empty());
}

#[test]
fn a_response_that_is_no_answer_is_not_tried_again() {
    let (error, waits, asked) = refusal(any(), |_| Reply::Say(200, "", "{\"choices\":".to_owned()));
    assert!(
        matches!(error, ServerError::Malformed(MalformedAnswer::Json(_))),
        "{error:?}"
    );
    assert_eq!((waits.len(), asked), (0, 1));
    let (error, ..) = refusal(any(), |_| {
        Reply::Say(200, "", "{\"choices\":[]}".to_owned())
    });
    assert!(matches!(
        error,
        ServerError::Malformed(MalformedAnswer::NoChoice)
    ));
}

#[test]
fn a_response_is_read_up_to_a_limit() {
    let limit = usize::try_from(ANSWER_BYTES).unwrap();
    let padded = move |more: usize| {
        let Reply::Say(status, header, mut body) = says("a") else {
            unreachable!()
        };
        body.push_str(&" ".repeat(limit - body.len() + more));
        Reply::Say(status, header, body)
    };
    let server = Server::start(move |_| padded(0));
    assert!(ask(&mut endpoint(server.settings()).0, &["q"]).is_ok());
    let (error, ..) = refusal(any(), move |_| padded(1));
    assert!(
        matches!(
            error,
            ServerError::TooLarge {
                limit: ANSWER_BYTES
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_key_that_the_server_repeats_is_not_shown() {
    let settings = EndpointSettings {
        api_key: Some("sk-one".parse().unwrap()),
        ..any()
    };
    let (error, ..) = refusal(settings, |_| fails(401, "", "no key sk-one"));
    assert_eq!(
        error.to_string(),
        "the server answers 401: no key [API key]"
    );
    assert!(!format!("{error:?}").contains("sk-one"));
}

#[test]
fn who_stops_at_an_answer_waits_for_no_other() {
    let server = Server::start(|seen| match seen.text() {
        "quick" => says("a"),
        _ => Reply::Hold,
    });
    let (mut endpoint, _) = endpoint(server.settings());
    let requests = requests(&["slow", "quick", "slower"]);
    let mut found = Vec::new();
    let outcome = endpoint.answer(&requests.iter().collect::<Vec<_>>(), 5, &mut |place, _| {
        found.push(place);
        ControlFlow::Break(())
    });
    assert!(matches!(outcome, Err(AnswerError::Interrupted)));
    assert_eq!(found, [1]);
}

#[test]
fn who_is_asked_to_stop_waits_for_no_answer() {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let server = Server::start(|_| {
        ASKED.store(true, Ordering::SeqCst);
        Reply::Hold
    });
    let (mut endpoint, _) = endpoint(EndpointSettings {
        asked_to_stop: || ASKED.load(Ordering::SeqCst),
        ..server.settings()
    });
    let outcome = ask(&mut endpoint, &["q"]);
    assert!(matches!(outcome, Err(AnswerError::Interrupted)));
}

#[test]
fn a_run_that_was_stopped_asks_only_for_what_it_has_no_answer_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let server = Server::start(|seen| says(&format!("re {}", seen.text())));
    let requests = requests(&["a", "b", "a", "c", "d"]);
    // The key tells the runs apart, since a request of the first may reach the server when the second has begun.
    let run = |key: &str, stop_at: usize| {
        let settings = EndpointSettings {
            concurrency: 1,
            api_key: Some(key.parse().unwrap()),
            ..server.settings()
        };
        let mut journal = Journal::open(&path).unwrap();
        let (mut endpoint, _) = endpoint(settings);
        journal.answers(
            &mut endpoint,
            &requests,
            5,
            &mut |done, _| match done == stop_at {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            },
        )
    };
    // The first answer is that of two rows; the second one stops the work.
    let stopped = run("first", 3);
    assert!(matches!(stopped, Err(JournalError::Interrupted)));
    let found = run("second", usize::MAX).unwrap();
    let texts: Vec<&str> = found.iter().map(|it| it.text.as_str()).collect();
    assert_eq!(texts, ["re a", "re b", "re a", "re c", "re d"]);
    let seen = server.seen.lock().unwrap();
    let of_second = seen
        .iter()
        .filter(|it| it.headers["authorization"] == "Bearer second");
    let asked: Vec<&str> = of_second.map(Seen::text).collect();
    assert_eq!(asked, ["c", "d"]);
}
