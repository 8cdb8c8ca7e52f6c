//! What stands between virtiofsd's server and the file system that it serves.
//!
//! The server hands a guest's numbers on as they are, and its file input and output panics at an offset that is no
//! `off64_t`. The server cannot be looked after from before it, since the guest may change a request after it was looked
//! at; from behind it can. This is also where it is seen whether there is a session, and with which options.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

use super::readers::{MAY_READ_UNOPENED, Readers, optional};

/// What the guest's kernel said it can do when it began a session; none while there is no session.
#[derive(Clone, Debug, Default)]
pub(super) struct Session(Arc<Mutex<Option<FsOptions>>>);

impl Session {
    pub(super) fn capable(&self) -> Option<FsOptions> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, capable: Option<FsOptions>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = capable;
    }
}

/// How much is copied between files at once, in bytes. Whoever wants more asks again.
const MAX_COPY: u64 = 1 << 20;

/// A file system that is asked nothing that it would panic at, or take without bound to do.
pub(super) struct Guard<F: FileSystem> {
    inner: Arc<F>,
    readers: Readers<F>,
    session: Session,
}

impl<F: FileSystem> Guard<F> {
    pub(super) fn new(inner: F, session: Session) -> Self {
        let inner = Arc::new(inner);
        Self { readers: Readers::new(inner.clone()), inner, session }
    }
}

/// What the guest calls an offset, if files have such offsets.
fn check(offset: u64) -> io::Result<()> {
    i64::try_from(offset).map(drop).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Methods that do what the inner file system does.
macro_rules! forward {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> $result {
            self.inner.$name($($argument),*)
        })*
    };
}

// All methods of the trait are here: one that is not would answer ENOSYS instead of the inner file system. Those that
// take nothing are left to that answer: locks, `ioctl`, `poll` and the like are not offered. Nor is `flush`, a round for
// each file that is closed: nothing is held back that it could write, and the guest's kernel keeps the locks.
impl<F: FileSystem> FileSystem for Guard<F> {
    type DirIter = F::DirIter;
    type Handle = F::Handle;
    type Inode = F::Inode;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.session.set(None);
        self.readers.close();
        let wanted = self.inner.init(capable)?;
        self.session.set(Some(capable));
        Ok(wanted)
    }

    fn destroy(&self) {
        self.session.set(None);
        self.readers.close();
        self.inner.destroy();
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        context: Context,
        inode: F::Inode,
        handle: F::Handle,
        writer: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        check(offset)?;
        let known = self.readers.known(context, inode, handle)?;
        self.inner.read(context, known.inode(), known.handle(), writer, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        context: Context,
        inode: F::Inode,
        handle: F::Handle,
        reader: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<usize> {
        check(offset)?;
        self.inner.write(context, inode, handle, reader, size, offset, lock_owner, delayed, kill_privileges, flags)
    }

    fn copyfilerange(
        &self,
        context: Context,
        inode: F::Inode,
        handle: F::Handle,
        offset: u64,
        to_inode: F::Inode,
        to_handle: F::Handle,
        to_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let length = length.min(MAX_COPY);
        let known = self.readers.known(context, inode, handle)?;
        let (inode, handle) = (known.inode(), known.handle());
        self.inner.copyfilerange(context, inode, handle, offset, to_inode, to_handle, to_offset, length, flags)
    }

    fn open(
        &self,
        context: Context,
        inode: F::Inode,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        let (handle, options) = self.inner.open(context, inode, kill_privileges, flags)?;
        Ok((handle, options | MAY_READ_UNOPENED))
    }

    fn getattr(&self, context: Context, inode: F::Inode, handle: Option<F::Handle>) -> io::Result<(Attr, Duration)> {
        self.inner.getattr(context, inode, optional::<F>(handle))
    }

    fn setattr(
        &self,
        context: Context,
        inode: F::Inode,
        attr: SetattrIn,
        handle: Option<F::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.inner.setattr(context, inode, attr, optional::<F>(handle), valid)
    }

    fn fsync(&self, context: Context, inode: F::Inode, data: bool, handle: F::Handle) -> io::Result<()> {
        let known = self.readers.known(context, inode, handle)?;
        self.inner.fsync(context, known.inode(), data, known.handle())
    }

    fn lseek(&self, context: Context, inode: F::Inode, handle: F::Handle, offset: u64, whence: u32) -> io::Result<u64> {
        let known = self.readers.known(context, inode, handle)?;
        self.inner.lseek(context, known.inode(), known.handle(), offset, whence)
    }

    fn forget(&self, context: Context, inode: F::Inode, count: u64) {
        let inode = inode.into();
        self.readers.forget(inode);
        self.inner.forget(context, inode.into(), count);
    }

    fn batch_forget(&self, context: Context, requests: Vec<(F::Inode, u64)>) {
        let requests: Vec<(u64, u64)> = requests.into_iter().map(|(inode, count)| (inode.into(), count)).collect();
        requests.iter().for_each(|(inode, _)| self.readers.forget(*inode));
        self.inner.batch_forget(context, requests.into_iter().map(|(inode, count)| (inode.into(), count)).collect());
    }

    forward! {
        fn lookup(c: Context, parent: F::Inode, name: &CStr) -> io::Result<Entry>;
        fn readlink(c: Context, inode: F::Inode) -> io::Result<Vec<u8>>;
        fn symlink(c: Context, link: &CStr, parent: F::Inode, name: &CStr, x: Extensions) -> io::Result<Entry>;
        fn mknod(
            c: Context, inode: F::Inode, name: &CStr, mode: u32, rdev: u32, umask: u32, x: Extensions
        ) -> io::Result<Entry>;
        fn mkdir(
            c: Context, parent: F::Inode, name: &CStr, mode: u32, umask: u32, x: Extensions
        ) -> io::Result<Entry>;
        fn unlink(c: Context, parent: F::Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(c: Context, parent: F::Inode, name: &CStr) -> io::Result<()>;
        fn rename(
            c: Context, from: F::Inode, old: &CStr, to: F::Inode, new: &CStr, flags: u32
        ) -> io::Result<()>;
        fn link(c: Context, inode: F::Inode, parent: F::Inode, name: &CStr) -> io::Result<Entry>;
        fn create(
            c: Context, parent: F::Inode, name: &CStr, mode: u32, kill: bool, flags: u32, umask: u32, x: Extensions
        ) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)>;
        fn fallocate(
            c: Context, inode: F::Inode, handle: F::Handle, mode: u32, offset: u64, length: u64
        ) -> io::Result<()>;
        fn release(
            c: Context, inode: F::Inode, flags: u32, handle: F::Handle, flush: bool, flock: bool, owner: Option<u64>
        ) -> io::Result<()>;
        fn statfs(c: Context, inode: F::Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(
            c: Context, inode: F::Inode, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags
        ) -> io::Result<()>;
        fn getxattr(c: Context, inode: F::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(c: Context, inode: F::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(c: Context, inode: F::Inode, name: &CStr) -> io::Result<()>;
        fn opendir(c: Context, inode: F::Inode, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn readdir(
            c: Context, inode: F::Inode, handle: F::Handle, size: u32, offset: u64
        ) -> io::Result<F::DirIter>;
        fn fsyncdir(c: Context, inode: F::Inode, data: bool, handle: F::Handle) -> io::Result<()>;
        fn releasedir(c: Context, inode: F::Inode, flags: u32, handle: F::Handle) -> io::Result<()>;
        fn access(c: Context, inode: F::Inode, mask: u32) -> io::Result<()>;
        fn syncfs(c: Context, inode: F::Inode) -> io::Result<()>;
    }
}

impl<F: FileSystem + SerializableFileSystem> SerializableFileSystem for Guard<F> {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        // The guest does not know of these, so nobody would close them again.
        self.readers.close();
        self.inner.prepare_serialization(cancel);
    }

    forward! {
        fn serialize(state: File) -> io::Result<()>;
        fn deserialize_and_apply(state: File) -> io::Result<()>;
    }
}
