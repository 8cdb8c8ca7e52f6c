//! When the device's thread looks for requests by itself.
//!
//! Where the host is a virtual machine itself, a processor that tells of a request leaves the guest and the kernel and
//! comes back, which takes 140 µs; 5 of them serve the request. A guest that asks often need not tell: the device's thread
//! looks at the queue, on another processor of the host's, while the guest's driver looks for the answer.
//!
//! The thread lets everybody else have its processor between two looks. Where somebody takes it for long, the thread gives
//! up, for longer each time; also where the driver tells of requests all the same, since nobody got to them.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::sched_getcpu;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity, sched_yield};

/// So many requests that processors tell of, each soon after the one before, are worth a look.
const MANY: u32 = 6;

/// So often in a shift others have served what the thread should have.
const MISSED: u32 = 3;

/// For so many turns of a waiting loop the thread does not look.
const LOOKS_APART: u32 = 16;

/// For how long the thread is not called after it gave up, the first time and at most.
const RESTS: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(2)];

/// How long is long.
pub(super) struct Spans {
    /// Requests that are closer to each other come together.
    pub(super) soon: Duration,
    /// The thread looks for so long where there is nothing.
    pub(super) patience: Duration,
    /// The thread looks for so long at once, and then does what else there is to do.
    pub(super) shift: Duration,
    /// Whoever had the thread's processor for so long meanwhile has use for all of it.
    pub(super) taken: Duration,
}

impl Default for Spans {
    fn default() -> Self {
        Self {
            soon: Duration::from_micros(300),
            patience: Duration::from_micros(300),
            shift: Duration::from_millis(10),
            taken: Duration::from_micros(500),
        }
    }
}

/// What processors and the thread tell each other.
pub(super) struct Lookout {
    pub(super) spans: Spans,
    looking: AtomicBool,
    missed: AtomicU32,
    pace: Mutex<Pace>,
}

struct Pace {
    /// When a processor told of a request, and how many did so soon after each other.
    last: Instant,
    streak: u32,
    /// Where on the host that was, once the thread is called.
    called_from: Option<usize>,
    not_before: Instant,
    rest: Duration,
}

impl Lookout {
    pub(super) fn new(spans: Spans) -> Self {
        let now = Instant::now();
        let pace = Pace { last: now, streak: 0, called_from: None, not_before: now, rest: RESTS[0] };
        Self { spans, looking: AtomicBool::new(false), missed: AtomicU32::new(0), pace: Mutex::new(pace) }
    }

    /// The calling processor has served a request. Whether the thread is to be called.
    pub(super) fn told(&self) -> bool {
        let now = Instant::now();
        let mut pace = self.pace();
        let soon = now.duration_since(pace.last) < self.spans.soon;
        pace.last = now;
        pace.streak = if soon { pace.streak.saturating_add(1) } else { 1 };
        if pace.streak < MANY || now < pace.not_before || pace.called_from.is_some() {
            return false;
        }
        pace.streak = 0;
        pace.called_from = sched_getcpu().ok();
        pace.called_from.is_some()
    }

    /// Whether the thread looks: then nobody else asks to be told.
    pub(super) fn looking(&self) -> bool {
        self.looking.load(Ordering::Acquire)
    }

    /// The calling processor was told although the thread looks, and may have found something.
    pub(super) fn told_all_the_same(&self, missed: bool) {
        if let Some(from) = self.pace().called_from.as_mut() {
            *from = sched_getcpu().unwrap_or(*from);
        }
        if missed && self.missed.fetch_add(1, Ordering::Relaxed) + 1 == MISSED {
            self.give_up();
        }
    }

    /// The calling thread looks from now on, if it is called and there is a processor for it.
    pub(super) fn begin(&self) -> Option<Post<'_>> {
        let from = self.pace().called_from?;
        let post = Post::beside(self, from);
        if post.is_none() {
            self.give_up();
            self.pace().called_from = None;
        }
        post
    }

    /// The thread looks no more, and is not called for a while.
    pub(super) fn give_up(&self) {
        self.looking.store(false, Ordering::Release);
        let mut pace = self.pace();
        pace.not_before = Instant::now() + pace.rest;
        pace.rest = (pace.rest * 2).min(RESTS[1]);
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The calling thread as it looks. Dropped, it is one like others.
pub(super) struct Post<'a> {
    lookout: &'a Lookout,
    home: CpuSet,
    goes_on: bool,
}

impl<'a> Post<'a> {
    /// On any of the thread's processors but this one.
    fn beside(lookout: &'a Lookout, processor: usize) -> Option<Self> {
        let home = sched_getaffinity(None).ok()?;
        let mut others = home;
        others.unset(processor);
        if others.count() == 0 {
            return None;
        }
        sched_setaffinity(None, &others).ok()?;
        lookout.missed.store(0, Ordering::Relaxed);
        lookout.looking.store(true, Ordering::Release);
        Some(Self { lookout, home, goes_on: false })
    }

    /// Whether it is to look on.
    pub(super) fn holds(&self) -> bool {
        self.lookout.looking()
    }

    /// It is called again as soon as it is done.
    pub(super) fn goes_on(&mut self) {
        self.goes_on = true;
    }

    /// Lets a moment pass, and others have the processor.
    pub(super) fn pause(&self) {
        for _ in 0..LOOKS_APART {
            hint::spin_loop();
        }
        let before = Instant::now();
        sched_yield();
        if before.elapsed() > self.lookout.spans.taken {
            self.lookout.give_up();
        }
    }
}

impl Drop for Post<'_> {
    fn drop(&mut self) {
        let held = self.lookout.looking.swap(false, Ordering::AcqRel);
        let mut pace = self.lookout.pace();
        if !self.goes_on {
            pace.called_from = None;
        }
        if held {
            pace.rest = RESTS[0];
        }
        drop(pace);
        // Where its processors were taken away meanwhile it stays on those that it was given.
        let _ = sched_setaffinity(None, &self.home);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn the_thread_is_called_once_for_many_requests_that_come_together() {
        let lookout = Lookout::new(Spans { soon: LONG, ..Spans::default() });
        assert!(lookout.begin().is_none());
        for _ in 1..MANY {
            assert!(!lookout.told());
        }
        // One that comes alone.
        lookout.pace().last = Instant::now() - LONG;
        assert!(!lookout.told());
        for _ in 2..MANY {
            assert!(!lookout.told());
        }
        assert!(lookout.told());
        assert!(!(0..2 * MANY).any(|_| lookout.told()), "it is called already");
    }

    #[test]
    fn who_looks_does_so_beside_who_asks_and_goes_home() {
        let home = sched_getaffinity(None).unwrap();
        let here = sched_getcpu().unwrap();
        let lookout = Lookout::new(Spans::default());
        lookout.pace().called_from = Some(here);
        match lookout.begin() {
            Some(post) => {
                assert!(post.holds());
                assert!(!sched_getaffinity(None).unwrap().is_set(here));
                drop(post);
            }
            None => assert_eq!(home.count(), 1, "there is another processor"),
        }
        assert!(!lookout.looking());
        assert_eq!(sched_getaffinity(None).unwrap(), home);
        assert!(lookout.begin().is_none(), "it is called no more");
    }

    #[test]
    fn who_does_not_get_to_look_rests_longer_each_time() {
        let lookout = Lookout::new(Spans { soon: LONG, ..Spans::default() });
        lookout.looking.store(true, Ordering::Release);
        for _ in 1..MISSED {
            lookout.told_all_the_same(true);
            lookout.told_all_the_same(false);
        }
        assert!(lookout.looking());
        lookout.told_all_the_same(true);
        assert!(!lookout.looking());
        let rests = std::iter::repeat_with(|| {
            let rest = lookout.pace().rest;
            lookout.give_up();
            rest
        });
        let rests: Vec<_> = rests.take(10).collect();
        assert!(rests.is_sorted() && rests[0] == 2 * RESTS[0] && rests[9] == RESTS[1], "{rests:?}");
        lookout.pace().rest = LONG;
        lookout.give_up();
        assert!(!(0..2 * MANY).any(|_| lookout.told()), "it rests");
    }
}
