//! Files that the guest reads without having opened them.
//!
//! To open and to close a file are two of the three requests that reading a small one takes, and each takes the guest's way out
//! and back. A kernel that is told so ([`MAY_READ_UNOPENED`]) leaves both out where it opens a file for reading: what it may read,
//! it decides itself, and the file is opened here when the first byte is asked for. A kernel that does not know the word ignores it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtiofsd::filesystem::{Context, FileSystem, OpenOptions};

/// In the answer to a file's opening: files need not be opened to be read. Of a file this flag has no meaning of its own.
pub(super) const MAY_READ_UNOPENED: OpenOptions = OpenOptions::CACHE_DIR;

/// The handle that the guest's kernel has for a file that it did not open. No server comes to so many.
pub(super) const UNOPENED: u64 = u64::MAX;

/// How many files are kept open for who reads on. More are opened anew in turn.
pub(super) const MAX_OPEN: usize = 64;

/// What is open, the longest unused first. To close one takes no time, so it is done under the lock: the file system keeps the
/// file itself until the guest has forgotten it.
pub(super) struct Readers<F: FileSystem> {
    inner: Arc<F>,
    open: Mutex<VecDeque<Arc<Reader<F>>>>,
}

/// A file that is open here and nowhere else.
struct Reader<F: FileSystem> {
    inner: Arc<F>,
    context: Context,
    inode: u64,
    handle: u64,
}

/// A file, and a handle of it that the file system knows for as long as this is there.
pub(super) struct Known<F: FileSystem> {
    inode: u64,
    handle: u64,
    _reader: Option<Arc<Reader<F>>>,
}

impl<F: FileSystem> Known<F> {
    pub(super) fn inode(&self) -> F::Inode {
        self.inode.into()
    }

    pub(super) fn handle(&self) -> F::Handle {
        self.handle.into()
    }
}

impl<F: FileSystem> Readers<F> {
    pub(super) fn new(inner: Arc<F>) -> Self {
        Self { inner, open: Mutex::default() }
    }

    /// The file that the guest means, opened for it if the guest has not.
    pub(super) fn known(&self, context: Context, inode: F::Inode, handle: F::Handle) -> io::Result<Known<F>> {
        let (inode, handle) = (inode.into(), handle.into());
        if handle != UNOPENED {
            return Ok(Known { inode, handle, _reader: None });
        }
        let reader = match self.kept(inode) {
            Some(reader) => reader,
            None => self.keep(Reader::open(self.inner.clone(), context, inode)?),
        };
        Ok(Known { inode, handle: reader.handle, _reader: Some(reader) })
    }

    fn kept(&self, inode: u64) -> Option<Arc<Reader<F>>> {
        let mut open = self.lock();
        let place = open.iter().position(|reader| reader.inode == inode)?;
        let reader = open.remove(place)?;
        open.push_back(reader.clone());
        Some(reader)
    }

    fn keep(&self, reader: Reader<F>) -> Arc<Reader<F>> {
        let reader = Arc::new(reader);
        let mut open = self.lock();
        open.push_back(reader.clone());
        if open.len() > MAX_OPEN {
            open.pop_front();
        }
        reader
    }

    /// The guest does not know this file any more. Who came to it at once with another may have opened it a second time.
    pub(super) fn forget(&self, inode: u64) {
        self.lock().retain(|reader| reader.inode != inode);
    }

    /// Closes all that nobody reads at the moment.
    pub(super) fn close(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Reader<F>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the guest means by a handle where the file system can do without: none for a file that it has not opened.
pub(super) fn optional<F: FileSystem>(handle: Option<F::Handle>) -> Option<F::Handle> {
    handle.map(Into::into).filter(|&handle: &u64| handle != UNOPENED).map(Into::into)
}

impl<F: FileSystem> Reader<F> {
    fn open(inner: Arc<F>, context: Context, inode: u64) -> io::Result<Self> {
        let (handle, _) = inner.open(context, inode.into(), false, libc::O_RDONLY.cast_unsigned())?;
        let handle = handle.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?.into();
        Ok(Self { inner, context, inode, handle })
    }
}

impl<F: FileSystem> Drop for Reader<F> {
    fn drop(&mut self) {
        let (flags, handle) = (libc::O_RDONLY.cast_unsigned(), self.handle.into());
        // An error is that it is closed already: by the end of the session.
        let _ = self.inner.release(self.context, self.inode.into(), flags, handle, false, false, None);
    }
}
