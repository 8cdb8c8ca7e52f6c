//! Host names, which UTS namespaces hold.
//!
//! A guest has its own. What stands for a container on the host has it too, for whoever looks there: the containers of
//! a pod take their name from the one that holds the pod's namespaces.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Puts the calling thread into a new UTS namespace with this host name.
///
/// # Errors
/// Those of unshare(2) and sethostname(2).
pub fn adopt(name: &str) -> io::Result<()> {
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUTS) }?;
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// The host name in the UTS namespace that a file stands for.
///
/// # Errors
/// Where the file is missing or is no UTS namespace.
pub fn in_namespace(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    // A thread of its own, which does not come back.
    let reader = std::thread::Builder::new().spawn(move || {
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::HostNameAndNISDomainName))?;
        Ok(rustix::system::uname().nodename().to_string_lossy().into_owned())
    })?;
    reader.join().unwrap_or_else(|_| Err(io::Error::other("the thread that reads it ended")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_seen_from_outside() {
        let (told, tid) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let holder = std::thread::spawn(move || {
            adopt("of-a-pod").unwrap();
            told.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
            wait.recv().unwrap();
        });
        let path = format!("/proc/self/task/{}/ns/uts", tid.recv().unwrap());
        assert_eq!(in_namespace(Path::new(&path)).unwrap(), "of-a-pod");
        assert_ne!(rustix::system::uname().nodename().to_bytes(), b"of-a-pod");
        done.send(()).unwrap();
        holder.join().unwrap();
        assert!(in_namespace(Path::new("/proc/self/ns/net")).is_err());
    }
}
