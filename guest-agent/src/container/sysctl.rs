//! Parameters of the kernel.

use std::collections::HashMap;
use std::fs;

/// Sets them, in the namespaces of the caller. /proc must be the guest's own.
pub(super) fn set(sysctls: &HashMap<String, String>) -> Result<(), String> {
    for (name, value) in sysctls {
        let path = if name.contains('/') { name.clone() } else { name.replace('.', "/") };
        if path.split('/').any(|part| part == "..") {
            return Err(format!("linux.sysctl: {name:?} is no parameter of the kernel"));
        }
        fs::write(format!("/proc/sys/{path}"), value)
            .map_err(|error| format!("cannot set linux.sysctl {name}={value}: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_below_proc_sys() {
        let set = |name: &str| set(&HashMap::from([(name.to_owned(), "1".to_owned())])).unwrap_err();
        assert!(set("net/../../self/comm").contains("is no parameter"));
        assert!(set("net.no.such").starts_with("cannot set linux.sysctl net.no.such=1: "));
    }
}
