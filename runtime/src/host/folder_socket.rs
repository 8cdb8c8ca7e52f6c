//! Sockets in folders with long paths: a socket's address has at most 107 bytes, an engine's state root and a container's
//! ID may have more.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// A stream socket in a folder.
#[derive(Debug)]
pub struct FolderSocket {
    folder: PathBuf,
    name: &'static str,
}

impl FolderSocket {
    /// The socket of this name.
    pub fn new(folder: &Path, name: &'static str) -> Self {
        Self { folder: folder.to_owned(), name }
    }

    /// Makes it, and listens.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn listen(&self) -> io::Result<UnixListener> {
        let (_folder, path) = self.short_path()?;
        UnixListener::bind(path)
    }

    /// Connects to who listens.
    ///
    /// # Errors
    /// Those of connect(2).
    pub async fn connect(&self) -> io::Result<UnixStream> {
        let (_folder, path) = self.short_path()?;
        UnixStream::connect(path).await
    }

    fn short_path(&self) -> io::Result<(File, PathBuf)> {
        let folder = File::open(&self.folder)?;
        let path = format!("/proc/self/fd/{}/{}", folder.as_raw_fd(), self.name).into();
        Ok((folder, path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_path_is_no_hindrance() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("x".repeat(200));
        std::fs::create_dir(&folder).unwrap();
        let socket = FolderSocket::new(&folder, "a.sock");
        assert_eq!(socket.connect().await.unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = socket.listen().unwrap();
        let (connected, accepted) = tokio::join!(socket.connect(), listener.accept());
        assert!(connected.is_ok() && accepted.is_ok() && folder.join("a.sock").exists());
    }
}
