//! The last steps into a container's program, taken inside the container.
//!
//! What is said here reaches the user through the engine, which tells one failure from another by runc's words: and
//! runc's are those of Go's `os/exec`.

use std::convert::Infallible;
use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, accessat, openat, statat};
use rustix::io::Errno;

/// The largest /etc/passwd that is searched for a home.
const MAX_PASSWD: u64 = 4 << 20;

/// The permissions of which a program has at least one.
const ANY_EXECUTES: Mode = Mode::XUSR.union(Mode::XGRP).union(Mode::XOTH);

/// Becomes the process's program, which was found at this path.
pub(super) fn run(path: &Path, process: &Process) -> Result<Infallible, String> {
    let arguments = process.args().iter().flatten();
    let failed = |error: &dyn fmt::Display| format!("exec {}: {error}", path.display());
    let program = CString::new(path.as_os_str().as_bytes()).map_err(|_| failed(&describe(Errno::INVAL)))?;
    let arguments = c_strings(arguments).ok_or_else(|| failed(&describe(Errno::INVAL)))?;
    let environment = c_strings(environment(process).iter()).ok_or_else(|| failed(&describe(Errno::INVAL)))?;
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    // SAFETY: the default action, which Rust's runtime has changed and programs expect, is no code of this process.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // SAFETY: both arrays end with a null pointer, and point to strings that live until the program replaces them.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOEXEC);
    Err(failed(&describe(errno)))
}

/// Finds the program as a shell would, with the process's PATH.
pub(super) fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process.args().iter().flatten().next().filter(|name| !name.is_empty());
    let name = name.ok_or(r#"exec: "": executable file not found in $PATH"#)?;
    if name.contains('/') {
        return match executable(CWD, Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Obstacle::Stat(errno)) => Err(format!("exec: {name:?}: stat {name}: {}", describe(errno))),
            Err(Obstacle::Forbidden) => Err(format!("exec: {name:?}: {}", describe(Errno::ACCESS))),
        };
    }
    let variables = process.env().iter().flatten();
    let path = variables.filter_map(|variable| variable.strip_prefix("PATH=")).next_back().unwrap_or_default();
    let mut folders = Folders::default();
    path.split(':')
        .filter(|folder| folder.starts_with('/'))
        .map(Path::new)
        .find(|folder| folders.have_executable(folder, name))
        .map(|folder| folder.join(name))
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

enum Obstacle {
    Stat(Errno),
    Forbidden,
}

/// The folders of a PATH and those that they are in, each looked up once: on the share every step of a path may be a
/// request, and that to something that is missing always is.
#[derive(Default)]
struct Folders(Vec<(PathBuf, Result<Rc<OwnedFd>, Errno>)>);

impl Folders {
    fn have_executable(&mut self, folder: &Path, name: &str) -> bool {
        match self.open(folder) {
            Ok(folder) => executable(folder.as_fd(), Path::new(name)).is_ok(),
            Err(Errno::NOENT | Errno::NOTDIR) => false,
            // The container's filter may know no such question.
            Err(_) => executable(CWD, &folder.join(name)).is_ok(),
        }
    }

    fn open(&mut self, path: &Path) -> Result<Rc<OwnedFd>, Errno> {
        if let Some((_, known)) = self.0.iter().find(|(known, _)| known == path) {
            return known.clone();
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => {
                self.open(parent).and_then(|parent| openat(parent, name, flags, Mode::empty()))
            }
            _ => openat(CWD, path, flags, Mode::empty()),
        };
        let opened = opened.map(Rc::new);
        self.0.push((path.to_owned(), opened.clone()));
        opened
    }
}

fn executable(folder: BorrowedFd<'_>, path: &Path) -> Result<(), Obstacle> {
    let status = statat(folder, path, AtFlags::empty()).map_err(Obstacle::Stat)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        return Err(Obstacle::Forbidden);
    }
    match accessat(folder, path, Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => Ok(()),
        // The container's filter may be older than this question: then the mode has to do, and execve(2) decides.
        Err(Errno::PERM | Errno::NOSYS) if Mode::from_raw_mode(status.st_mode).intersects(ANY_EXECUTES) => Ok(()),
        Err(_) => Err(Obstacle::Forbidden),
    }
}

/// The process's variables: of several with one name the last counts, in the place of the first. HOME, where it has
/// no value, is the user's in the container.
fn environment(process: &Process) -> Vec<String> {
    let mut variables: Vec<String> = Vec::new();
    for variable in process.env().iter().flatten() {
        let name = variable.split_inclusive('=').next().unwrap_or_default();
        match variables.iter_mut().find(|earlier| earlier.starts_with(name)) {
            Some(earlier) => earlier.clone_from(variable),
            None => variables.push(variable.clone()),
        }
    }
    let home = variables.iter().position(|variable| variable.starts_with("HOME="));
    if home.is_none_or(|index| variables[index] == "HOME=") {
        let value = format!("HOME={}", home_of(process.user().uid()).unwrap_or_else(|| "/".into()));
        match home {
            Some(index) => variables[index] = value,
            None => variables.push(value),
        }
    }
    variables
}

/// The home of a user after /etc/passwd. This is no place for the C library's look-up, which loads code that the
/// container's own configuration names.
fn home_of(uid: u32) -> Option<String> {
    let file = File::open("/etc/passwd").ok().filter(|file| file.metadata().is_ok_and(|data| data.is_file()))?;
    home_in(BufReader::new(file.take(MAX_PASSWD)), uid)
}

fn home_in(passwd: impl std::io::BufRead, uid: u32) -> Option<String> {
    passwd.lines().map_while(Result::ok).find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()?.parse() == Ok(uid)).then_some(())?;
        Some(fields.nth(2)?.to_owned()).filter(|home| !home.is_empty())
    })
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a String>) -> Option<Vec<CString>> {
    texts.map(|text| CString::new(text.as_bytes()).ok()).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// An error as Go writes it.
pub(crate) fn describe(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::ProcessBuilder;

    fn process(name: &str, env: &[&str]) -> Process {
        let env: Vec<String> = env.iter().map(|&variable| variable.to_owned()).collect();
        ProcessBuilder::default().args(vec![name.to_owned()]).env(env).build().unwrap()
    }

    #[test]
    fn programs_are_found_as_in_a_shell() {
        let in_path = |path: &str| find(&process("sh", &[&format!("PATH={path}")]));
        assert_eq!(in_path("/nowhere:/bin"), Ok("/bin/sh".into()));
        assert_eq!(in_path("/no/where:/no/there::bin:/etc/passwd/x:/usr/../bin/"), Ok("/usr/../bin/sh".into()));
        assert_eq!(find(&process("/bin/sh", &[])), Ok("/bin/sh".into()));
    }

    #[test]
    fn programs_that_are_not_there_are_named_as_runc_does() {
        let not_found = |name: &str, env: &[&str]| find(&process(name, env)).unwrap_err();
        assert_eq!(not_found("nope", &["PATH=/bin"]), r#"exec: "nope": executable file not found in $PATH"#);
        assert_eq!(not_found("sh", &[]), r#"exec: "sh": executable file not found in $PATH"#);
        assert_eq!(not_found("/nope", &[]), r#"exec: "/nope": stat /nope: no such file or directory"#);
        assert_eq!(not_found("/etc", &[]), r#"exec: "/etc": permission denied"#);
        assert_eq!(not_found("/etc/passwd", &[]), r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(not_found("/etc/passwd/x", &[]), r#"exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory"#);
    }

    #[test]
    fn the_last_of_a_variable_counts_in_the_first_place() {
        let env = environment(&process("sh", &["A=1", "B=2", "A=3", "HOME=/h"]));
        assert_eq!(env, ["A=3", "B=2", "HOME=/h"]);
    }

    #[test]
    fn home_comes_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/srv/web:\nnone:x:7:7:::\n";
        assert_eq!(home_in(passwd.as_bytes(), 33).as_deref(), Some("/srv/web"));
        assert_eq!(home_in(passwd.as_bytes(), 7), None);
        assert_eq!(home_in(passwd.as_bytes(), 1), None);
    }
}
