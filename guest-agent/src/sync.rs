//! Locks of a process with one thread.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock. The agent ends on a panic, so what is behind a lock is always sound.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
