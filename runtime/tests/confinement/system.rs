//! System calls by their numbers: what an attacker makes needs no library.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::libc;

/// Makes a system call. Pointers among the arguments are null, or to memory that the caller has for this call.
pub fn call<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> io::Result<usize> {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: the kernel writes to nothing but what the callers below have made for it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A number as an argument, whatever its sign.
pub fn argument(number: impl Into<i64>) -> usize {
    number.into() as usize
}

/// A path as the kernel takes it.
pub fn c_path(path: &Path) -> Vec<u8> {
    [path.as_os_str().as_bytes(), &[0]].concat()
}

/// The handle by which a file can be opened, where its file system has such: a `struct file_handle`.
pub fn handle_of(path: &Path) -> io::Result<Vec<u8>> {
    let room = libc::MAX_HANDLE_SZ as u32;
    let mut handle = vec![0; 8 + room as usize];
    handle[..4].copy_from_slice(&room.to_ne_bytes());
    let (path, mut mount) = (c_path(path), 0i32);
    let arguments =
        [argument(libc::AT_FDCWD), path.as_ptr() as usize, handle.as_mut_ptr() as usize, &raw mut mount as usize, 0];
    call(libc::SYS_name_to_handle_at, arguments)?;
    Ok(handle)
}
