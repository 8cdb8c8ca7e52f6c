//! Locks of a process with one thread.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock. What is guarded is whole after each statement, also after a panic.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
