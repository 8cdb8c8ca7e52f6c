//! What there is to be reached: made anew for each test, by the test's own process, which plays the owner of the VM.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::{self, UnixListener};
use std::path::{Path, PathBuf};

use libtest_mimic::Failed;
use runvm::share::Export;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::system;

/// What the owner has in its memory and in a file.
pub const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;

/// The exports, by their names in the tree.
const WRITABLE: &str = "writable";
const READ_ONLY: &str = "read-only";

/// The ground, as an attacker is told of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Map {
    /// The owner's PID.
    pub owner: i32,
    /// Where in its memory [`SECRET`] is.
    pub secret: usize,
    /// A folder of the host's that is no export, with the files `secret`, `doomed` and a listening `socket`.
    pub outside: PathBuf,
    /// An export, with `program`, a listening `socket`, and the links `absolute` and `relative` to the secret.
    pub writable: PathBuf,
    /// Another.
    pub read_only: PathBuf,
    /// Where the owner listens for TCP.
    pub tcp: SocketAddr,
    /// The abstract name of a socket where it listens.
    pub name: String,
    /// By which the secret's file can be opened, on a file system that has such handles.
    pub handle: Option<Vec<u8>>,
}

impl Map {
    /// What the process shares with its guest.
    pub fn exports(&self) -> [Export; 2] {
        let export = |path: &str, source: &Path, read_only| Export {
            path: path.into(),
            source: source.into(),
            read_only,
            recursive: true,
            id_map: None,
        };
        [export(WRITABLE, &self.writable, false), export(READ_ONLY, &self.read_only, true)]
    }

    /// The same, where the exports are all of the file system.
    pub fn inside(self) -> Self {
        Self { writable: Path::new("/").join(WRITABLE), read_only: Path::new("/").join(READ_ONLY), ..self }
    }
}

/// The ground itself. It is gone when this is dropped.
pub struct Ground {
    /// What to tell an attacker.
    pub map: Map,
    secret: Box<u64>,
    _folder: TempDir,
    _listeners: (TcpListener, [UnixListener; 3]),
}

impl Ground {
    /// Makes it.
    pub fn make() -> Result<Self, Failed> {
        let folder = TempDir::new()?;
        let [outside, writable, read_only] = ["outside", WRITABLE, READ_ONLY].map(|name| folder.path().join(name));
        for folder in [&outside, &writable, &read_only] {
            fs::create_dir(folder)?;
        }
        let file = outside.join("secret");
        fs::write(&file, SECRET.to_ne_bytes())?;
        fs::write(outside.join("doomed"), "")?;
        fs::copy("/bin/true", writable.join("program"))?;
        symlink(&file, writable.join("absolute"))?;
        symlink("../outside/secret", writable.join("relative"))?;
        let name = format!("runvm-confinement-{}", folder.path().display());
        let address = net::SocketAddr::from_abstract_name(&name)?;
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let sockets = [
            UnixListener::bind_addr(&address)?,
            UnixListener::bind(outside.join("socket"))?,
            UnixListener::bind(writable.join("socket"))?,
        ];
        let secret = Box::new(SECRET);
        let map = Map {
            owner: std::process::id().cast_signed(),
            secret: &raw const *secret as usize,
            outside,
            writable,
            read_only,
            tcp: tcp.local_addr()?,
            name,
            handle: system::handle_of(&file).ok(),
        };
        Ok(Self { map, secret, _folder: folder, _listeners: (tcp, sockets) })
    }

    /// Whether it is as it was made, but for what is exported to be written.
    pub fn check(&self) -> Result<(), Failed> {
        let mut names = fs::read_dir(&self.map.outside)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<Vec<_>>>()?;
        names.sort();
        let untouched = names == ["doomed", "secret", "socket"]
            && fs::read(self.map.outside.join("secret"))? == SECRET.to_ne_bytes()
            && fs::read_dir(&self.map.read_only)?.next().is_none()
            && *self.secret == SECRET;
        if untouched { Ok(()) } else { Err(format!("what is outside the exports has changed: {names:?}").into()) }
    }
}
