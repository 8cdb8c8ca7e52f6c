//! Threads that work beside the one that starts them.

use std::mem::{size_of, zeroed};
use std::os::unix::thread::JoinHandleExt;

/// Has a thread that was just started run on other processors than the caller's, where there are such. Linux starts and wakes
/// a thread on the processor of whoever does so, and where the others share no cache with that one it may stay there for
/// a time slice or two, an idle processor or not: milliseconds.
pub(super) fn send(thread: &impl JoinHandleExt) {
    // SAFETY: a set of processors is plain bits, which may all be zero.
    let mut processors = unsafe { zeroed::<libc::cpu_set_t>() };
    // SAFETY: the set is of that size.
    let known = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut processors) } == 0;
    // SAFETY: it only asks.
    let here = usize::try_from(unsafe { libc::sched_getcpu() });
    let (true, Ok(here)) = (known, here) else { return };
    // SAFETY: a processor that the set has no bit for is left out of account.
    unsafe { libc::CPU_CLR(here, &mut processors) };
    // SAFETY: the handle holds on to the thread, and the set is of that size. Where no processor is left the kernel refuses,
    // and the thread runs where it may.
    unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of::<libc::cpu_set_t>(), &raw const processors) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn a_thread_leaves_the_processor_of_who_sends_it() {
        let (here, told) = mpsc::channel();
        let (go, wait) = mpsc::channel();
        let thread = thread::spawn(move || {
            wait.recv().unwrap();
            // SAFETY: a set of processors is plain bits, which may all be zero.
            let mut processors = unsafe { zeroed::<libc::cpu_set_t>() };
            // SAFETY: the set is of that size.
            unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut processors) };
            // SAFETY: it only looks at the set.
            here.send(unsafe { libc::CPU_COUNT(&processors) }).unwrap();
        });
        send(&thread);
        go.send(()).unwrap();
        let all = thread::available_parallelism().unwrap().get();
        assert_eq!(told.recv().unwrap(), (all - 1).max(1) as i32);
        thread.join().unwrap();
    }
}
