//! The suites that hold runvm to its promises on real engines.
