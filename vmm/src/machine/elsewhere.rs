//! Threads that work beside the one that starts them.

use std::os::unix::thread::JoinHandleExt;

use rustix::thread::{sched_getaffinity, sched_getcpu};

/// Has a thread that was just started run on other processors than the caller's, where there are such. Linux starts and wakes
/// a thread on the processor of whoever does so, and where the others share no cache with that one it may stay there for
/// a time slice or two, an idle processor or not: milliseconds.
pub(super) fn send(thread: &impl JoinHandleExt) {
    let Ok(mut others) = sched_getaffinity(None) else { return };
    others.unset(sched_getcpu());
    let (size, set) = (size_of_val(&others), (&raw const others).cast());
    // SAFETY: the handle holds on to the thread, and the set is of that size and in the kernel's form, which is the C library's
    // too. Where no processor is left the kernel refuses, and the thread runs where it may.
    unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size, set) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn a_thread_leaves_the_processor_of_who_sends_it() {
        let (go, wait) = mpsc::channel();
        let thread = thread::spawn(move || {
            wait.recv().unwrap();
            sched_getaffinity(None).unwrap().count()
        });
        send(&thread);
        go.send(()).unwrap();
        let all = sched_getaffinity(None).unwrap().count();
        assert_eq!(thread.join().unwrap(), (all - 1).max(1));
    }
}
