//! How long to wait before a request is tried again.
//!
//! Waits double from one try to the next, and each is cut by up to half of it by chance, so that requests that failed together do not come back
//! together. The chance is a function of the request's place. What the server asks for (`Retry-After`) is the least that is waited.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The waits between the tries of one request.
#[derive(Debug)]
pub(super) struct Waits {
    chance: ChaCha8Rng,
    next: Duration,
}

impl Waits {
    /// Those of the request at `place`.
    pub(super) fn of(place: usize) -> Self {
        Self {
            chance: ChaCha8Rng::seed_from_u64(place as u64),
            next: FIRST,
        }
    }

    /// The next of them, and at least as long as was `asked` for.
    pub(super) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let share = f64::from(self.chance.next_u32()) / f64::from(u32::MAX);
        let wait = self.next.mul_f64(1.0 - share / 2.0);
        self.next = (self.next * 2).min(LONGEST);
        asked.map_or(wait, |asked| wait.max(asked))
    }
}

/// What a `Retry-After` header asks for: seconds, or until a date. None if it is neither.
///
/// Source: RFC 9110, 10.2.3. Fractions of seconds are not in it, and some servers send them.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        let seconds = Some(seconds).filter(|it| it.is_finite() && *it >= 0.0)?;
        return Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    // One that is over asks for nothing.
    Some(date.duration_since(now).unwrap_or_default())
}

/// Tells the time, and lets it pass.
pub(super) trait Clock: fmt::Debug + Send + Sync {
    /// The time of day.
    fn now(&self) -> SystemTime;

    /// Waits so long, or until the thread is unparked with `stopped` set.
    fn sleep(&self, duration: Duration, stopped: &AtomicBool);
}

/// The machine's own clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Real;

impl Clock for Real {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, duration: Duration, stopped: &AtomicBool) {
        let start = Instant::now();
        while !stopped.load(Ordering::SeqCst) {
            let left = duration.saturating_sub(start.elapsed());
            if left.is_zero() {
                return;
            }
            // May wake up for no reason.
            thread::park_timeout(left);
        }
    }
}

/// The first wait at most.
const FIRST: Duration = Duration::from_secs(1);

/// A wait at most that nobody asked for.
const LONGEST: Duration = Duration::from_secs(60);

/// The longest wait that a server is given, if it asks. One that asks for more, such as a day for its quota, is not waited for.
pub(super) const LONGEST_ASKED: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_minute_and_are_cut_by_at_most_half() {
        let mut waits = Waits::of(3);
        for whole in [1, 2, 4, 8, 16, 32, 60, 60] {
            let (found, whole) = (waits.next(None), Duration::from_secs(whole));
            assert!(found <= whole && found >= whole / 2, "{found:?} {whole:?}");
        }
    }

    #[test]
    fn waits_are_those_of_the_place() {
        let of = |place| {
            let mut waits = Waits::of(place);
            [(); 4].map(|()| waits.next(None))
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn a_wait_that_is_asked_for_is_the_least() {
        let asked = Duration::from_secs(7);
        let mut waits = Waits::of(0);
        assert_eq!(waits.next(Some(asked)), asked);
        for _ in 0..4 {
            waits.next(None);
        }
        assert!(waits.next(Some(asked)) >= Duration::from_secs(16));
    }

    #[test]
    fn seconds_and_dates_are_read() {
        // Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let read = |value| retry_after(value, now);
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(read(" 0 "), Some(Duration::ZERO));
        assert_eq!(read("1.5"), Some(Duration::from_millis(1500)));
        assert_eq!(read("1e300"), Some(Duration::MAX));
        assert_eq!(
            read("Sun, 06 Nov 1994 08:50:07 GMT"),
            Some(Duration::from_secs(30))
        );
        assert_eq!(read("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        for value in ["", "-1", "nan", "inf", "soon"] {
            assert_eq!(read(value), None, "{value}");
        }
    }

    #[test]
    fn nobody_waits_who_was_stopped() {
        Real.sleep(Duration::MAX, &AtomicBool::new(true));
    }
}
