mod lookout;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::thread;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::thread::sched_getaffinity;
use tempfile::TempDir;
use virtiofsd::fuse::{BatchForgetIn, CopyfilerangeIn, LkIn, OpenIn, OpenOut, OutHeader, ReadIn};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{Config, MigrationOnError, NegotiationMode, PassthroughFs};
use vm_memory::ByteValued as _;

use super::super::Poller;
use super::super::driver::{Driver, Piece, Request};
use super::client::{Client, Opcode, ROOT, object};
use super::desk::{BATCH, MAX_MESSAGE};
use super::readers::{MAX_OPEN, MAY_READ_UNOPENED, UNOPENED};
use super::*;
use crate::confinement::{Role, in_role};

/// How long the answer to a question for attributes is, in bytes.
const ATTRIBUTES: u32 = 120;

type Guest = Client<Fs<PassthroughFs>>;

fn device(root: &Path) -> Fs<PassthroughFs> {
    Fs::new("share", served(root)).unwrap()
}

fn served(root: &Path) -> PassthroughFs {
    let config = Config {
        root_dir: root.to_str().unwrap().into(),
        announce_submounts: true,
        xattr: true,
        xattrmap: Some(XattrMap::try_from(":ok:all:::").unwrap()),
        posix_acl: NegotiationMode::Auto,
        killpriv_v2: true,
        guest_fd_limit: 1000,
        migration_on_error: MigrationOnError::GuestError,
        ..Config::default()
    };
    PassthroughFs::new(config).unwrap()
}

fn tree() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("folder")).unwrap();
    fs::write(tree.path().join("folder/file"), "content").unwrap();
    tree
}

fn guest(root: &Path) -> Guest {
    let mut guest = Client::new(device(root)).unwrap();
    guest.begin().unwrap();
    guest
}

/// Puts a request into its queue, with room for a short answer.
fn put(driver: &mut Driver, request: &[u8]) -> Request {
    driver.put(REQUESTS, &[Piece::Readable(request), Piece::Writable(256)])
}

/// How many descriptors of this process lead into the tree.
fn open_files(root: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    open.filter(|entry| fs::read_link(entry.as_ref().unwrap().path()).is_ok_and(|to| to.starts_with(root))).count()
}

#[test]
fn the_configuration_names_the_tag_and_the_queues() {
    let tree = tree();
    let bytes = device(tree.path()).config().bytes();
    assert_eq!(bytes.len(), 40);
    assert!(bytes.starts_with(b"share\0"));
    assert_eq!(bytes[36..], [1, 0, 0, 0]);
    for tag in ["", &"x".repeat(37)] {
        let served = PassthroughFs::new(Config::default()).unwrap();
        assert!(matches!(Fs::new(tag, served), Err(FsError::Tag(_))), "{tag}");
    }
}

#[test]
fn requests_may_be_a_megabyte() {
    let tree = tree();
    let mut guest = Client::new(device(tree.path())).unwrap();
    let agreed = guest.begin().unwrap();
    assert_eq!((agreed.max_write, agreed.max_pages), (1 << 20, 256));
    let longest = u32::from(agreed.max_pages) + 4;
    assert!(u32::from(guest.device.queue_sizes()[REQUESTS]) >= longest);

    let large: Vec<u8> = (0..1u32 << 20).map(|byte| (byte % 251) as u8).collect();
    let (entry, handle) = guest.create(ROOT, "large").unwrap();
    assert_eq!(guest.write(entry.node, handle, 0, &large), Ok(1 << 20));
    assert_eq!(guest.read(entry.node, handle, 0, 1 << 20).unwrap(), large);
    assert_eq!(fs::read(tree.path().join("large")).unwrap(), large);
}

#[test]
fn a_tree_is_used() {
    let tree = tree();
    let root = tree.path();
    let mut guest = guest(root);
    let file = guest.find("folder/file").unwrap();
    assert_eq!(file.attributes.size, 7);
    assert_eq!(guest.find("folder/none").unwrap_err(), libc::ENOENT);

    let handle = guest.open(file.node, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(file.node, handle, 3, 100).unwrap(), b"tent");
    assert_eq!(guest.write(file.node, handle, 7, b" added"), Ok(6));
    assert_eq!(fs::read_to_string(root.join("folder/file")).unwrap(), "content added");
    guest.release(file.node, handle).unwrap();
    assert_eq!(guest.read(file.node, handle, 0, 1), Err(libc::EBADF));

    let folder = guest.find("folder").unwrap();
    guest.create(folder.node, "new").unwrap();
    assert_eq!(fs::metadata(root.join("folder/new")).unwrap().permissions().mode() & 0o777, 0o644);
    let flags = OpenIn { flags: libc::O_RDONLY.cast_unsigned(), ..Default::default() };
    let opened = guest.request(Opcode::Opendir, folder.node, &[flags.as_slice()]).unwrap();
    let handle = u64::from_le_bytes(opened[..8].try_into().unwrap());
    let mut names = guest.names(folder.node, handle).unwrap();
    names.sort();
    assert_eq!(names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [".", "..", "file", "new"]);
    assert_eq!(names[2].1, file.node);
}

#[test]
fn a_reset_lets_go_of_everything() {
    let tree = tree();
    let root = tree.path();
    let mut guest = guest(root);
    let file = guest.find("folder/file").unwrap();
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(open_files(root), 4);

    guest.forget(file.node, 1);
    assert_eq!(open_files(root), 3);
    assert_eq!(guest.open(file.node, libc::O_RDONLY), Err(libc::EBADF));

    guest.device.reset();
    assert_eq!(open_files(root), 0);
    guest.device.start(&mut guest.driver.io).unwrap();
    assert_eq!(guest.read(file.node, handle, 0, 1), Err(libc::EBADF));
    assert!(guest.device.save().unwrap().is_empty());
    guest.begin().unwrap();
    assert_eq!(guest.find("folder/file").unwrap().attributes.size, 7);
}

#[test]
fn what_would_wait_for_somebody_is_not_opened() {
    let tree = tree();
    let kinds = [("fifo", FileType::Fifo), ("socket", FileType::Socket)];
    for (name, kind) in kinds {
        mknodat(CWD, tree.path().join(name), kind, Mode::RWXU, 0).unwrap();
    }
    symlink("/dev/zero", tree.path().join("link")).unwrap();
    let mut guest = guest(tree.path());
    for name in ["fifo", "socket", "link"] {
        let node = guest.find(name).unwrap().node;
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EBADF), "{name}");
    }
    for what in [Opcode::Setlk, Opcode::Setlkw] {
        assert_eq!(guest.request(what, ROOT, &[LkIn::default().as_slice()]), Err(libc::ENOSYS));
    }
}

#[test]
fn a_session_goes_on_in_another_device() {
    let tree = tree();
    let root = tree.path();
    assert!(device(root).save().unwrap().is_empty(), "there is nothing to save before anything was mounted");
    device(root).restore(&[]).unwrap();

    let mut first = guest(root);
    let file = first.find("folder/file").unwrap().node;
    let reading = first.open(file, libc::O_RDONLY).unwrap();
    let (new, writing) = first.create(ROOT, "new").unwrap();
    first.write(new.node, writing, 0, b"one").unwrap();
    let gone = first.create(ROOT, "gone").unwrap();
    fs::remove_file(root.join("gone")).unwrap();
    fs::rename(root.join("folder"), root.join("renamed")).unwrap();
    let saved = first.device.save().unwrap();
    first.write(new.node, writing, 3, b" two").unwrap();
    drop(first);

    let mut second = device(root);
    second.restore(&saved).unwrap();
    let mut second = Client::new(second).unwrap();
    assert_eq!(second.read(file, reading, 0, 100).unwrap(), b"content");
    assert_eq!(second.write(new.node, writing, 7, b" three"), Ok(6));
    assert_eq!(fs::read_to_string(root.join("new")).unwrap(), "one two three");
    assert_eq!(second.find("renamed/file").unwrap().node, file);
    assert!(second.read(gone.0.node, gone.1, 0, 1).is_err(), "it has no path");

    // The options that both sides agreed on hold as well: with one of them SETXATTR looks so, else it is malformed.
    let attribute = [4u32, 0, 0, 0].map(u32::to_le_bytes).concat();
    let set = second.request(Opcode::Setxattr, new.node, &[&attribute, b"user.runvm\0", b"set!"]);
    assert!(matches!(set, Ok(_) | Err(libc::EOPNOTSUPP)), "{set:?}");

    assert!(second.device.save().unwrap().len() > 20);
}

#[test]
fn requests_take_no_more_than_a_processors_thread_may() {
    let tree = tree();
    let mut guest = Client::new(device(tree.path())).unwrap();
    in_role(Role::Vcpu, || make_all_requests(&mut guest));
}

#[test]
fn requests_take_no_more_than_the_devices_thread_may() {
    let tree = tree();
    let mut guest = Client::new(device(tree.path())).unwrap();
    let mut second = device(tree.path());
    in_role(Role::Device(Kind::FileSystem), || {
        let (node, handle) = make_all_requests(&mut guest);
        second.restore(&guest.device.save().unwrap()).unwrap();
        second.start(&mut guest.driver.io).unwrap();
        guest.device = second;
        assert_eq!(guest.read(node, handle, 0, 3).unwrap(), b"con");
        guest.device.reset();
    });
}

/// One of each kind; a file that is left, and its handle.
fn make_all_requests(guest: &mut Guest) -> (u64, u64) {
    guest.begin().unwrap();
    let folder = guest.find("folder").unwrap().node;
    let (new, handle) = guest.create(folder, "new").unwrap();
    assert_eq!(guest.write(new.node, handle, 0, b"content"), Ok(7));
    assert_eq!(guest.read(new.node, handle, 0, 100).unwrap(), b"content");
    let words = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    let mode_and_mask = |mode: u32| words(&[mode.into()]);
    // Mode, owner, size and both times.
    let mut attributes = words(&[0b1_1111_1011, handle, 3, 0, 0, 0, 0, 0, 0o600 << 32, 0, 0]);
    attributes[72..76].copy_from_slice(&0o600u32.to_le_bytes());
    let extended = [&words(&[4, 0])[..], b"user.runvm\0", b"set!"].concat();
    let listed = [&4096u64.to_le_bytes()[..], b"user.runvm\0"].concat();
    for (what, node, arguments) in [
        (Opcode::Mkdir, folder, [&mode_and_mask(0o755)[..], b"made\0"].concat()),
        (Opcode::Mknod, folder, [&words(&[u64::from(libc::S_IFIFO | 0o600), 0])[..], b"fifo\0"].concat()),
        (Opcode::Symlink, folder, b"link\0file\0".to_vec()),
        (Opcode::Link, folder, [&words(&[new.node])[..], b"again\0"].concat()),
        (Opcode::Rename2, folder, [&words(&[folder, 0])[..], b"again\0other\0"].concat()),
        (Opcode::Unlink, folder, b"other\0".to_vec()),
        (Opcode::Rmdir, folder, b"made\0".to_vec()),
        (Opcode::Getattr, new.node, words(&[0, 0])),
        (Opcode::Setattr, new.node, attributes),
        (Opcode::Setxattr, new.node, extended),
        (Opcode::Getxattr, new.node, listed.clone()),
        (Opcode::Listxattr, new.node, words(&[4096])),
        (Opcode::Removexattr, new.node, b"user.runvm\0".to_vec()),
        (Opcode::Statfs, new.node, Vec::new()),
        (Opcode::Access, new.node, words(&[4])),
        (Opcode::Fallocate, new.node, words(&[handle, 0, 4096, 0])),
        (Opcode::Lseek, new.node, words(&[handle, 0, libc::SEEK_DATA as u64])),
        (Opcode::CopyFileRange, new.node, words(&[handle, 0, new.node, handle, 8192, 3, 0])),
        (Opcode::Fsync, new.node, words(&[handle, 0])),
        (Opcode::Fsync, new.node, words(&[handle, 1])),
        (Opcode::Syncfs, ROOT, words(&[0])),
    ] {
        let answer = guest.request(what, node, &[&arguments]);
        assert!(matches!(answer, Ok(_) | Err(libc::EOPNOTSUPP)), "{what:?}: {answer:?}");
    }
    let closed = guest.request(Opcode::Flush, new.node, &[&words(&[handle, 0, 0])]);
    assert_eq!(closed, Err(libc::ENOSYS), "a file is closed without a word");
    let link = guest.find("folder/link").unwrap().node;
    assert_eq!(guest.request(Opcode::Readlink, link, &[]).unwrap(), b"file");
    (new.node, handle)
}

#[test]
fn a_damaged_session_is_refused_and_leaves_nothing() {
    let tree = tree();
    let root = tree.path();
    let mut first = guest(root);
    let file = first.find("folder/file").unwrap().node;
    first.open(file, libc::O_RDONLY).unwrap();
    let saved = first.device.save().unwrap();
    drop(first);

    for length in 1..saved.len() {
        let mut damaged = device(root);
        assert!(damaged.restore(&saved[..length]).is_err(), "{length}");
        assert_eq!(open_files(root), 0, "{length}");
    }
    // Some of these are states as well.
    for index in 0..saved.len() {
        for change in [1, 0x80, 0xff] {
            let mut bytes = saved.clone();
            bytes[index] ^= change;
            let mut damaged = device(root);
            if damaged.restore(&bytes).is_err() {
                assert!(damaged.save().unwrap().is_empty(), "{index}");
            }
        }
    }
    assert_eq!(open_files(root), 0);
    assert!(device(root).restore(&vec![0xff; (state::MAX_STATE + 65) as usize]).is_err());
}

#[test]
fn malformed_requests_are_refused_and_the_device_goes_on() {
    let tree = tree();
    let mut guest = guest(tree.path());
    let file = guest.find("folder/file").unwrap().node;
    let handle = guest.open(file, libc::O_RDWR).unwrap();

    for operation in [0, 7, 49, 4096, u32::MAX] {
        assert_eq!(guest.request_for(operation, ROOT, &[&[0; 64]], 64), Err(libc::ENOSYS), "{operation}");
    }
    for (name, error) in [(&b"folder"[..], libc::EINVAL), (b"", libc::EINVAL), (b"fol\0der\0", libc::EINVAL)] {
        assert_eq!(guest.request(Opcode::Lookup, ROOT, &[name]), Err(error), "{name:?}");
    }
    // No room for what there is to say.
    assert_eq!(guest.request_for(Opcode::Getattr as u32, ROOT, &[&[0; 16]], 32), Err(libc::EIO));
    // Offsets that no file has.
    for offset in [i64::MAX as u64, 1 << 63, u64::MAX] {
        assert_eq!(guest.read(file, handle, offset, 64), Err(libc::EINVAL));
        assert_eq!(guest.write(file, handle, offset, b"content"), Err(libc::EINVAL));
    }
    // More is forgotten than is said.
    let many = BatchForgetIn { count: u32::MAX, dummy: 0 };
    assert_eq!(guest.request(Opcode::BatchForget, ROOT, &[many.as_slice()]), Err(libc::ENOMEM));
    let many = BatchForgetIn { count: 1000, dummy: 0 };
    assert_eq!(guest.request(Opcode::BatchForget, ROOT, &[many.as_slice()]), Err(libc::EINVAL));
    // More is asked for than there is room.
    let large = ReadIn { fh: handle, size: u32::MAX, ..Default::default() };
    assert_eq!(guest.request_for(Opcode::Read as u32, file, &[large.as_slice()], 20), Ok(b"cont".to_vec()));
    assert_eq!(guest.request(Opcode::Readdirplus, ROOT, &[large.as_slice()]), Err(libc::ENOMEM));
    assert_eq!(guest.request(Opcode::Getxattr, ROOT, &[&[0xff; 8], b"user.x\0"]), Err(libc::ENOMEM));

    assert_eq!(guest.read(file, handle, 0, 64).unwrap(), b"content");
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    let tree = tree();
    let mut guest = guest(tree.path());
    for (length, error) in [
        (0u32, libc::EINVAL),
        (39, libc::EINVAL),
        (48, libc::EINVAL),
        (1 << 20, libc::EINVAL),
        (u32::MAX, libc::ENOMEM),
    ] {
        for what in [Opcode::Lookup, Opcode::Setxattr, Opcode::Mkdir, Opcode::Rename, Opcode::Create] {
            let mut request = guest.compose(what as u32, ROOT, &[b"folder\0"]);
            request[..4].copy_from_slice(&length.to_le_bytes());
            let answer = guest.put(REQUESTS, &[Piece::Readable(&request), Piece::Writable(256)]);
            assert_eq!(answer.len(), 16, "{what:?} {length}");
            assert_eq!(answer[4..8], (-error).to_le_bytes(), "{what:?} {length}");
        }
    }
    guest.find("folder/file").unwrap();
}

#[test]
fn chains_that_lack_a_part_are_given_back() {
    let tree = tree();
    let mut guest = guest(tree.path());
    let node = guest.find("folder/file").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let read = ReadIn { fh: handle, size: 4, ..Default::default() };
    let empty = ReadIn::default();
    for (what, argument) in [(Opcode::Read, &read), (Opcode::Readdir, &empty), (Opcode::Readdirplus, &empty)] {
        let request = guest.compose(what as u32, node, &[argument.as_slice()]);
        assert!(guest.put(REQUESTS, &[Piece::Readable(&request)]).is_empty());
        assert!(guest.put(REQUESTS, &[Piece::Readable(&request), Piece::Writable(15)]).is_empty());
    }
    assert!(guest.put(REQUESTS, &[Piece::Writable(64)]).is_empty());
    assert!(guest.put(REQUESTS, &[Piece::Readable(&[0; 39]), Piece::Writable(64)]).is_empty());
    let request = guest.compose(Opcode::Getattr as u32, node, &[&[0; 16]]);
    for (address, length) in [(1 << 40, 64), (u64::MAX, 64), (0, u32::MAX)] {
        let outside = Piece::Raw { address, length, flags: 2, next: 0 };
        assert!(guest.put(REQUESTS, &[Piece::Readable(&request), outside]).is_empty());
    }
    assert_eq!(guest.read(node, handle, 0, 4).unwrap(), b"cont");
}

#[test]
fn a_file_is_read_without_being_opened() {
    let tree = tree();
    let root = tree.path();
    let mut guest = guest(root);
    let file = guest.find("folder/file").unwrap().node;
    let flags = OpenIn { flags: libc::O_RDONLY.cast_unsigned(), ..Default::default() };
    let answer = guest.request(Opcode::Open, file, &[flags.as_slice()]).unwrap();
    let opened: OpenOut = object(&answer);
    assert_eq!(opened.open_flags & MAY_READ_UNOPENED.bits(), MAY_READ_UNOPENED.bits());
    guest.release(file, opened.fh).unwrap();

    let known = open_files(root);
    fs::remove_file(root.join("folder/file")).unwrap();
    assert_eq!(guest.read(file, UNOPENED, 3, 100).unwrap(), b"tent");
    assert_eq!(guest.read(file, UNOPENED, 0, 3).unwrap(), b"con");
    assert_eq!(open_files(root), known + 1);
    assert_eq!(guest.write(file, UNOPENED, 0, b"x"), Err(libc::EBADF));
    guest.forget(file, 1);
    assert_eq!(open_files(root), known - 1);
    assert_eq!(guest.read(file, UNOPENED, 0, 3), Err(libc::EBADF));
}

#[test]
fn few_files_are_kept_open_for_who_reads() {
    let tree = tree();
    let root = tree.path();
    let mut guest = guest(root);
    let nodes: Vec<_> = (0..2 * MAX_OPEN)
        .map(|number| {
            fs::write(root.join(number.to_string()), number.to_string()).unwrap();
            guest.find(&number.to_string()).unwrap().node
        })
        .collect();
    let known = open_files(root);
    for _ in 0..2 {
        for (number, &node) in nodes.iter().enumerate() {
            assert_eq!(guest.read(node, UNOPENED, 0, 100).unwrap(), number.to_string().as_bytes());
        }
    }
    assert_eq!(open_files(root), known + MAX_OPEN);
    // Nobody would close them in the machine that goes on.
    let saved = guest.device.save().unwrap();
    assert_eq!(open_files(root), known);
    let mut second = device(root);
    second.restore(&saved).unwrap();
    assert_eq!(open_files(root), 2 * known);
}

#[test]
fn no_request_takes_as_long_as_it_likes() {
    let tree = tree();
    fs::File::create(tree.path().join("large")).unwrap().set_len(20 << 20).unwrap();
    let mut guest = guest(tree.path());
    let node = guest.find("large").unwrap().node;
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let read = ReadIn { fh: handle, size: 3 << 20, ..Default::default() };
    let answer = guest.request_for(Opcode::Read as u32, node, &[read.as_slice()], 3 << 20).unwrap();
    assert_eq!(answer.len(), MAX_MESSAGE - size_of::<OutHeader>());

    let (other, into) = guest.create(ROOT, "other").unwrap();
    let copy =
        CopyfilerangeIn { fh_in: handle, nodeid_out: other.node, fh_out: into, len: 20 << 20, ..Default::default() };
    let answer = guest.request(Opcode::CopyFileRange, node, &[copy.as_slice()]).unwrap();
    assert_eq!(answer[..4], (1u32 << 20).to_le_bytes());
}

#[test]
fn a_full_queue_is_served_in_batches() {
    let tree = tree();
    let mut guest = guest(tree.path());
    let requests: Vec<_> = (0..3 * BATCH)
        .map(|_| {
            let request = guest.compose(Opcode::Getattr as u32, ROOT, &[&[0; 16]]);
            put(&mut guest.driver, &request)
        })
        .collect();
    let attendant = guest.device.attendant().unwrap();
    for (turn, batch) in requests.chunks(BATCH).enumerate() {
        assert!(guest.driver.used(REQUESTS).is_none());
        // By a processor, and by the device's thread, which it leaves the rest to.
        if turn == 0 {
            attendant.attend(REQUESTS).unwrap();
            assert!(guest.driver.io.queues[REQUESTS].kick_descriptor().clear());
        } else {
            guest.device.queue_ready(&mut guest.driver.io, REQUESTS).unwrap();
        }
        for request in batch {
            assert_eq!(guest.driver.used(REQUESTS), Some((request.head, ATTRIBUTES)));
        }
    }
}

#[test]
fn what_waits_for_a_disk_is_left_to_the_devices_thread() {
    let tree = tree();
    fs::File::create(tree.path().join("large")).unwrap().set_len(1 << 20).unwrap();
    let mut guest = guest(tree.path());
    let node = guest.find("large").unwrap().node;
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let read = ReadIn { fh: handle, size: 1 << 20, ..Default::default() };
    let sync = [handle, 0].map(u64::to_le_bytes).concat();
    let attendant = guest.device.attendant().unwrap();
    for (what, arguments, room, long) in [
        (Opcode::Read, read.as_slice(), 1 << 20, false),
        (Opcode::Read, read.as_slice(), 4096, false),
        (Opcode::Fsync, &sync, 256, true),
        (Opcode::Getattr, &[0; 16], 256, false),
    ] {
        let request = guest.compose(what as u32, node, &[arguments]);
        let put = guest.driver.put(REQUESTS, &[Piece::Readable(&request), Piece::Writable(room)]);
        attendant.attend(REQUESTS).unwrap();
        assert_eq!(guest.driver.io.queues[REQUESTS].kick_descriptor().clear(), long, "{what:?}");
        let answered = guest.driver.used(REQUESTS);
        assert_eq!(answered.is_none(), long, "{what:?}");
        // Before a pause everything is answered.
        guest.device.rest(&mut guest.driver.io).unwrap();
        let (head, _) = answered.or_else(|| guest.driver.used(REQUESTS)).unwrap();
        assert_eq!(head, put.head, "{what:?}");
    }
}

#[test]
fn no_more_is_left_to_the_devices_thread_than_a_queue_holds() {
    let tree = tree();
    let mut guest = guest(tree.path());
    let node = guest.find("folder/file").unwrap().node;
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let request = guest.compose(Opcode::Fsync as u32, node, &[&[handle, 0].map(u64::to_le_bytes).concat()]);
    let put = put(&mut guest.driver, &request);
    let attendant = guest.device.attendant().unwrap();
    // The same one again and again, as no driver would.
    let mut attended = 0;
    while guest.driver.used(REQUESTS).is_none() {
        assert!(attended <= usize::from(REQUEST_QUEUE_SIZE), "{attended} are left");
        for _ in 0..BATCH {
            guest.driver.offer(REQUESTS, put.head);
        }
        attendant.attend(REQUESTS).unwrap();
        attended += BATCH;
    }
    assert!(attended >= usize::from(REQUEST_QUEUE_SIZE), "only {attended} were left");
}

#[test]
fn several_processors_are_served_at_once() {
    const EACH: usize = 300;
    let tree = tree();
    let mut guest = guest(tree.path());
    let request = guest.compose(Opcode::Getattr as u32, ROOT, &[&[0; 16]]);
    let mut expected: Vec<_> = (0..2 * EACH).map(|_| put(&mut guest.driver, &request).head).collect();
    let attendant = guest.device.attendant().unwrap();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..2 * EACH / BATCH + 1).for_each(|_| attendant.attend(REQUESTS).unwrap()));
        }
    });
    let mut answered: Vec<_> = std::iter::from_fn(|| guest.driver.used(REQUESTS)).collect();
    assert!(answered.iter().all(|&(_, written)| written == ATTRIBUTES));
    answered.sort_unstable();
    expected.sort_unstable();
    assert_eq!(answered.into_iter().map(|(head, _)| head).collect::<Vec<_>>(), expected);
}

#[test]
fn a_device_that_was_reset_answers_nobody() {
    let tree = tree();
    let mut guest = guest(tree.path());
    let request = guest.compose(Opcode::Getattr as u32, ROOT, &[&[0; 16]]);
    put(&mut guest.driver, &request);
    let attendant = guest.device.attendant().unwrap();
    guest.device.reset();
    attendant.attend(REQUESTS).unwrap();
    assert_eq!(guest.driver.used(REQUESTS), None);
    attendant.attend(usize::MAX).unwrap();
}
