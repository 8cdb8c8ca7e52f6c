//! regex-lite by the name of regex, for libraries that check a field of a configuration with it now and then.
//!
//! regex itself would be a fifth of the guest's agent, which every guest has in its memory: a megabyte of tables and of
//! engines that are fast where there is much to search. What is different is that `\w` and the like are ASCII.

pub use regex_lite::*;
