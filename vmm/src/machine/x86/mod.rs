//! What is particular to x86-64: how a kernel is entered, how it finds the processors, and what of a processor has to be
//! saved.

pub mod boot;
pub mod cpuid;
pub mod host;
mod mptable;
pub mod registers;
pub mod state;

pub use mptable::MAX_VCPUS;
