//! The shared file system, over a small tree that the host changes, too.

mod requests;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};

use arbitrary::{Result, Unstructured};
use runvm_vmm::virtio::fs::Fs;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, MigrationOnError, NegotiationMode, PassthroughFs};

use crate::bench::{self, Bench, Subject};
use crate::guest::{Piece, length, raw};
use crate::jail;
use requests::Opcode;

const URGENT: usize = 0;
const REQUESTS: usize = 1;

/// How many files the guest may know.
const LIMIT: u64 = 64;
const NAMES: [&str; 9] = ["folder", "file", "link", "fifo", "new", "..", ".", "folder/file", ""];

/// Does what the input says.
pub fn run(data: &[u8]) {
    jail::run(bench::run::<Share>, data);
}

struct Share;

#[expect(clippy::expect_used, reason = "a fuzzer ends where it cannot fuzz")]
impl Subject for Share {
    type Device = Fs<PassthroughFs>;

    fn new(_: &mut Unstructured<'_>) -> Result<Self> {
        fs::create_dir("/folder").expect("a tree");
        fs::write("/folder/file", "content").expect("a tree");
        symlink("folder/file", "/link").expect("a tree");
        mknodat(CWD, "/fifo", FileType::Fifo, Mode::RWXU, 0).expect("a tree");
        Ok(Self)
    }

    fn device(&mut self) -> Fs<PassthroughFs> {
        let attributes = ":prefix:all:trusted.:user.virtiofs.: :unsupported:all:security.:security.: :ok:all:::";
        let config = Config {
            root_dir: "/".into(),
            proc_sfd_rawfd: jail::own_descriptors().map(Into::into),
            cache_policy: CachePolicy::Always,
            guest_fd_limit: LIMIT,
            announce_submounts: true,
            xattr: true,
            xattrmap: Some(XattrMap::try_from(attributes).expect("a map")),
            posix_acl: NegotiationMode::Auto,
            allow_direct_io: true,
            killpriv_v2: true,
            migration_on_error: MigrationOnError::GuestError,
            ..Config::default()
        };
        Fs::new("share", PassthroughFs::new(config).expect("a share")).expect("a device")
    }

    fn request(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<Vec<Piece>> {
        if u.ratio(1, 12)? {
            return raw(u);
        }
        let opcode = if queue == URGENT && u.ratio(3, 4)? { Opcode::urgent(u)? } else { Opcode::any(u)? };
        request(u, opcode)
    }

    /// The host changes files below the guest.
    fn event(&mut self, u: &mut Unstructured<'_>, _: &mut Fs<PassthroughFs>) -> Result<()> {
        let path = |u: &mut Unstructured<'_>| Ok(format!("/{}", u.choose(&NAMES[..5])?));
        let (one, other) = (path(u)?, path(u)?);
        // Not all of it is possible at any time.
        match u.int_in_range(0..=6)? {
            0 => {
                let length = u.int_in_range(0..=9000)?;
                let _ = open(&one).and_then(|mut file| file.write_all(&vec![b'x'; length]));
            }
            1 => drop(fs::remove_file(&one)),
            2 => drop(fs::rename(&one, &other)),
            3 => drop(fs::create_dir(&one)),
            4 => drop(fs::hard_link(&one, &other)),
            5 => drop(symlink(&one, &other)),
            _ => {
                // What is never written takes no memory.
                let length = *u.choose(&[0, 1, 4097, 1 << 40])?;
                let _ = open(&one).and_then(|file| file.set_len(length));
            }
        }
        Ok(())
    }

    /// A session: the folder is node 2, its file is node 3 and open as 0, the root as 1.
    fn sequence(bench: &mut Bench<Self>, u: &mut Unstructured<'_>) -> Result<()> {
        // All that the first 32 options are, and all or nothing of the others: two of these take more of other requests.
        let options = *u.choose(&[0, u32::MAX])?;
        let version = [7, 38, 0, u32::MAX, options].map(u32::to_le_bytes);
        let init = [version.as_flattened(), &[0; 44]].concat();
        let read_and_write = 2u64.to_le_bytes();
        let steps: [(u32, u64, &[u8]); 5] =
            [(26, 0, &init), (1, 1, b"folder\0"), (1, 2, b"file\0"), (14, 3, &read_and_write), (27, 1, &[0; 8])];
        for (number, node, arguments) in steps {
            let header = header(40 + arguments.len() as u32, number, node, 0);
            let pieces = [Piece::Readable([header, arguments.to_vec()].concat()), Piece::Writable(256)];
            bench.request_of(u, REQUESTS, &pieces)?;
        }
        for _ in 0..u.int_in_range(1..=8)? {
            bench.request(u, REQUESTS)?;
        }
        Ok(())
    }
}

/// Opens a file, and waits for nobody, whatever it is by now.
fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)
}

/// A request of this kind, laid out as Linux does, with room for its answer.
fn request(u: &mut Unstructured<'_>, opcode: Opcode) -> Result<Vec<Piece>> {
    let arguments = opcode.arguments(u)?;
    let mut said = 40 + arguments.len() as u32;
    let mut number = opcode.number();
    let mut node: u64 = *u.choose(&[1, 2, 3, 3, 4])?;
    if u.ratio(1, 8)? {
        match u.int_in_range(0..=2)? {
            0 => said = length(u)?,
            1 => number = u.arbitrary()?,
            _ => node = u.arbitrary()?,
        }
    }
    let user: u32 = if u.ratio(1, 8)? { 1000 } else { 0 };
    let header = header(said, number, node, user);
    let mut pieces = vec![Piece::Readable(header), Piece::Readable(arguments)];
    if u.ratio(15, 16)? {
        pieces.push(Piece::Writable(16));
        pieces.push(Piece::Writable(if u.ratio(1, 8)? { length(u)? } else { 8192 }));
    }
    Ok(pieces)
}

fn header(length: u32, opcode: u32, node: u64, user: u32) -> Vec<u8> {
    [
        &length.to_le_bytes()[..],
        &opcode.to_le_bytes(),
        // The request's number.
        &7u64.to_le_bytes(),
        &node.to_le_bytes(),
        &user.to_le_bytes(),
        &user.to_le_bytes(),
        // The process, the extensions and what pads them.
        &[0; 8],
    ]
    .concat()
}
