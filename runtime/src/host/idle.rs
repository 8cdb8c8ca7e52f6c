//! A process that has nothing to do, and what it can do without.
//!
//! Two processes stand for each container, most of which wait most of the time. What they needed to come so far they
//! need no more: pages of the program that are read again where they are missed, and heap that is free.

use std::ops::Range;
use std::time::Duration;

use nix::libc;
use runvm_vmm::Watch;
use rustix::time::{ClockId, clock_gettime};

/// Who did next to nothing for so long has nothing to do: the share of one processor's time is 1/[`BUSY`].
const SETTLED: Duration = Duration::from_secs(1);
const BUSY: u32 = 20;
/// How often somebody is looked at who is never found to have nothing to do, or always.
const SELDOM: Duration = Duration::from_secs(64);
/// Who used so much of a processor's time since came to things that can be given back once more.
const STIRRED: Duration = Duration::from_millis(5);
/// Giving back takes at most so much of the time: 1/[`COST`] of it.
const COST: u32 = 100;

/// Tells when this process has come to rest, by the processor's time that it has used.
#[derive(Debug)]
pub struct Idleness {
    pause: Duration,
    /// What was used when it was last looked at.
    before: Duration,
    /// What was used when it last gave back.
    rested: Option<Duration>,
}

impl Idleness {
    /// Of a process that begins.
    pub fn new() -> Self {
        Self { pause: SETTLED, before: used(), rested: None }
    }

    /// How long to wait until the next [look](Self::look).
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// Whether it has nothing to do, and something to give back. If so [`Self::rest`] is to be told.
    pub fn look(&mut self) -> bool {
        self.look_at(used())
    }

    /// Something was given back, which took so long.
    pub fn rest(&mut self, took: Duration) {
        self.rest_at(used(), took);
    }

    fn look_at(&mut self, used: Duration) -> bool {
        let idle = used.saturating_sub(self.before) < self.pause / BUSY;
        self.before = used;
        let stirred = self.rested.is_none_or(|rested| used.saturating_sub(rested) >= STIRRED);
        if !(idle && stirred) {
            self.pause = (self.pause * 2).min(SELDOM);
        }
        idle && stirred
    }

    fn rest_at(&mut self, used: Duration, took: Duration) {
        self.before = used;
        self.rested = Some(used);
        self.pause = (self.pause * 2).min(SELDOM).max(took * COST);
    }
}

impl Default for Idleness {
    fn default() -> Self {
        Self::new()
    }
}

fn used() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

/// Gives back what this process can do without, whenever it has come to rest; does not return.
pub async fn give_back_when_idle() {
    let mut spare = None;
    let mut idleness = Idleness::new();
    loop {
        tokio::time::sleep(idleness.pause()).await;
        if idleness.look() {
            spare.get_or_insert_with(Spare::new).give_back();
            idleness.rest(Duration::ZERO);
        }
    }
}

/// What this process can do without.
#[derive(Debug)]
pub struct Spare {
    /// Has the program come back page by page; none where the host has none.
    watch: Option<Watch>,
}

impl Spare {
    /// That of a process that can still do all that it could.
    pub fn new() -> Self {
        Self { watch: Watch::new().ok() }
    }

    /// Gives it back: pages of the program, which the host has in memory all the same and hands out again for the asking,
    /// and heap.
    pub fn give_back(&self) {
        for Range { start, end } in program() {
            // SAFETY: the range is of a mapping of the program's file that was never written to, so that what is touched
            // next is as it was.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
            if let Some(watch) = &self.watch {
                // Without it more comes back than is needed, and nothing else is different.
                let _ = watch.over(start, end - start);
            }
        }
        #[cfg(target_env = "gnu")]
        // SAFETY: only what is free goes back.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

impl Default for Spare {
    fn default() -> Self {
        Self::new()
    }
}

/// Where the parts of the program are in memory that nobody writes to, in whole pages.
fn program() -> Vec<Range<usize>> {
    extern "C" fn list(program: *mut libc::dl_phdr_info, _: libc::size_t, parts: *mut libc::c_void) -> libc::c_int {
        // SAFETY: dl_iterate_phdr(3) points to a description that is there during the call.
        let program = unsafe { &*program };
        // SAFETY: there are as many headers as it says, for as long as the program runs.
        let headers = unsafe { std::slice::from_raw_parts(program.dlpi_phdr, program.dlpi_phnum.into()) };
        // SAFETY: it is what was handed in below, and nobody else's during the call.
        let parts = unsafe { &mut *parts.cast::<Vec<Range<usize>>>() };
        let page = rustix::param::page_size();
        let constant =
            headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
        parts.extend(constant.map(|header| {
            let start = (program.dlpi_addr + header.p_vaddr) as usize;
            start.next_multiple_of(page)..(start + header.p_memsz as usize) / page * page
        }));
        // The first is the program itself. Libraries, where there are any, are shared by the whole host.
        1
    }
    let mut parts: Vec<Range<usize>> = Vec::new();
    // SAFETY: the function is called during this call only, with a pointer to these parts.
    unsafe { libc::dl_iterate_phdr(Some(list), (&raw mut parts).cast()) };
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn begun() -> Idleness {
        Idleness { pause: SETTLED, before: Duration::ZERO, rested: None }
    }

    #[test]
    fn who_works_is_left_alone_and_looked_at_less_and_less_often() {
        let mut idleness = begun();
        let mut used = Duration::ZERO;
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64, 64] {
            assert_eq!(idleness.pause(), Duration::from_secs(seconds));
            used += idleness.pause() / 10;
            assert!(!idleness.look_at(used));
        }
        assert!(idleness.look_at(used + 64 * MS));
    }

    #[test]
    fn who_rests_gives_back_once_and_again_when_it_has_worked() {
        let mut idleness = begun();
        assert!(idleness.look_at(20 * MS));
        idleness.rest_at(50 * MS, 30 * MS);
        assert_eq!(idleness.pause(), Duration::from_secs(3));
        assert!(!idleness.look_at(51 * MS));
        assert!(idleness.look_at(60 * MS));
        idleness.rest_at(90 * MS, 2000 * MS);
        assert_eq!(idleness.pause(), Duration::from_secs(200));
    }

    #[test]
    fn what_was_given_back_is_there_again() {
        static CONSTANT: [u8; 3 << 16] = [7; 3 << 16];
        let sum = || CONSTANT.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        let resident = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let address = CONSTANT.as_ptr().addr() + CONSTANT.len() / 2;
            let mapping = maps.lines().skip_while(|line| {
                let range = line.split(' ').next().unwrap().split_once('-');
                let number = |digits| usize::from_str_radix(digits, 16).ok();
                !range.is_some_and(|(from, to)| number(from) <= Some(address) && Some(address) < number(to))
            });
            let line = mapping.into_iter().find(|line| line.starts_with("Rss:")).unwrap().to_owned();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = sum();
        let full = resident();
        Spare::new().give_back();
        assert!(resident() + (CONSTANT.len() >> 10) / 2 < full, "{full} {}", resident());
        assert_eq!(sum(), before);
    }
}
