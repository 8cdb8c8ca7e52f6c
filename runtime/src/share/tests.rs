//! The daemon as it is: each test runs this program again to be one, and speaks to it as a VMM and a guest do. They
//! need root.

mod guest;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec};
use tempfile::TempDir;

use super::*;
use guest::{Entry, Guest, READLINK, ROOT, SETXATTR, UNLINK, c_string};

/// Nothing waits so long in a test that passes.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Not a test: what the program does when the others run it as the daemon.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    std::process::exit(i32::from(daemon_main() != ExitCode::SUCCESS));
}

fn spawn_daemon(exports: &[Export]) -> Daemon {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--ignored", "--exact", "--nocapture", "--test-threads=1", "share::tests::daemon"]);
    spawn(command, exports).unwrap()
}

fn export(path: &str, source: &Path) -> Export {
    Export { path: path.into(), source: source.into(), read_only: false, recursive: true, id_map: None }
}

fn boot(exports: &[Export]) -> (Daemon, Guest) {
    let mut daemon = spawn_daemon(exports);
    let socket = daemon.connect().unwrap();
    (daemon, Guest::new(socket))
}

fn refusal(exports: &[Export]) -> String {
    spawn_daemon(exports).connect().unwrap_err().to_string()
}

fn has_ended(daemon: &Daemon) -> bool {
    let mut ended = [PollFd::from_borrowed_fd(daemon.pidfd(), PollFlags::IN)];
    rustix::event::poll(&mut ended, Some(&PATIENCE)).unwrap() == 1
}

/// The thread's directory in /proc that reads what the guest says.
fn serving_thread(daemon: &Daemon) -> PathBuf {
    let threads = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let mut paths = threads.map(|thread| thread.unwrap().path());
    paths.find(|path| fs::read_to_string(path.join("comm")).unwrap().starts_with("vring")).unwrap()
}

#[test]
fn directories_and_files_of_the_host_are_served_at_their_places() {
    let host = TempDir::new().unwrap();
    fs::create_dir(host.path().join("root")).unwrap();
    fs::write(host.path().join("root/hello"), "from the host").unwrap();
    fs::write(host.path().join("hosts"), "127.0.0.1 localhost").unwrap();
    let exports = [export("box/rootfs", &host.path().join("root")), export("box/mounts/0", &host.path().join("hosts"))];
    let (_daemon, mut guest) = boot(&exports);
    assert_eq!(guest.cat("box/rootfs/hello").unwrap(), "from the host");
    assert_eq!(guest.cat("box/mounts/0").unwrap(), "127.0.0.1 localhost");
    assert_eq!(guest.find("box/rootfs/missing"), Err(libc::ENOENT));

    let root = guest.find("box/rootfs").unwrap();
    guest.create(root.node, "new").unwrap();
    let made = fs::metadata(host.path().join("root/new")).unwrap();
    assert_eq!((made.uid(), made.permissions().mode() & 0o7777), (0, 0o644));
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let host = TempDir::new().unwrap();
    fs::write(host.path().join("file"), "precious").unwrap();
    let (_daemon, mut guest) = boot(&[Export { read_only: true, ..export("box/mounts/0", host.path()) }]);
    assert_eq!(guest.cat("box/mounts/0/file").unwrap(), "precious");
    let volume = guest.find("box/mounts/0").unwrap();
    let file = guest.find("box/mounts/0/file").unwrap();
    assert_eq!(guest.open(file.node, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(guest.create(volume.node, "new"), Err(libc::EROFS));
    assert_eq!(guest.request(UNLINK, volume.node, &c_string("file")), Err(libc::EROFS));
    // So is the tree that the exports hang in.
    assert_eq!(guest.create(ROOT, "new"), Err(libc::EROFS));
    let above = guest.find("box").unwrap();
    assert_eq!(guest.create(above.node, "new"), Err(libc::EROFS));
}

#[test]
fn what_only_the_host_changes_is_asked_for_anew() {
    let host = TempDir::new().unwrap();
    fs::create_dir(host.path().join("sub")).unwrap();
    fs::write(host.path().join("sub/file"), "one").unwrap();
    let volume = Path::new(FRESH).join("box/0");
    let exports = [export("rootfs/box", host.path()), export(volume.to_str().unwrap(), host.path())];
    let (_daemon, mut guest) = boot(&exports);
    for (path, trust) in [
        ("rootfs", 1),
        ("rootfs/box/sub/file", 1),
        ("fresh", 0),
        ("fresh/box/0", 0),
        ("fresh/box/0/sub/file", 0),
        // A name and no more.
        ("rootfs/box/fresh", 1),
    ] {
        if path.ends_with("box/fresh") {
            fs::create_dir(host.path().join("fresh")).unwrap();
        }
        assert_eq!(guest.find(path).unwrap().trust, [trust, trust], "{path}");
    }
    assert_eq!(guest.cat("fresh/box/0/sub/file").unwrap(), "one");
    let directory = guest.find("fresh/box/0/sub").unwrap();
    guest.create(directory.node, "new").unwrap();
    assert!(host.path().join("sub/new").exists());
    guest.request(UNLINK, directory.node, &c_string("new")).unwrap();
    assert!(!host.path().join("sub/new").exists());
}

#[test]
fn exports_come_and_go_while_the_share_is_served() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let host = TempDir::new().unwrap();
    fs::write(host.path().join("file"), "here").unwrap();
    let (daemon, mut guest) = boot(&[export("rootfs/1", host.path())]);
    // Only here the daemon is not its process's first thread, which has stayed on the host: there nothing is ever mounted.
    let stranger = Served::by(daemon.pidfd().try_clone_to_owned().unwrap());
    assert!(runtime.block_on(stranger.add(vec![export("rootfs/2", host.path())])).is_err());
    let namespace = serving_thread(&daemon).join("ns/mnt");
    let share = Served::by(fs::File::open(namespace).unwrap().into());
    let file = export("mounts/2/0", &host.path().join("file"));
    runtime.block_on(share.add(vec![export("rootfs/2", host.path()), file.clone()])).unwrap();
    assert_eq!(guest.cat("rootfs/2/file").unwrap(), "here");
    assert_eq!(guest.cat("mounts/2/0").unwrap(), "here");
    let root = guest.find("rootfs").unwrap();
    assert_eq!(guest.create(root.node, "new"), Err(libc::EROFS));

    // All or none, and nothing in place of what is there.
    let missing = export("rootfs/3", Path::new("/no/such"));
    let refused = runtime.block_on(share.add(vec![export("mounts/3", host.path()), missing])).unwrap_err();
    assert!(refused.to_string().contains("/no/such"), "{refused}");
    assert_eq!(guest.find("mounts/3"), Err(libc::ENOENT));
    assert!(matches!(runtime.block_on(share.add(vec![file])), Err(SetupError::Place { .. })));
    assert_eq!(guest.cat("mounts/2/0").unwrap(), "here");

    runtime.block_on(share.remove(vec!["rootfs/2".into(), "mounts/2/0".into(), "mounts/none".into()])).unwrap();
    assert_eq!(guest.find("rootfs/2"), Err(libc::ENOENT));
    assert_eq!(guest.find("mounts/2"), Err(libc::ENOENT));
    guest.find("mounts").unwrap();
    assert_eq!(guest.cat("rootfs/1/file").unwrap(), "here");
    let mounts = fs::read_to_string(serving_thread(&daemon).join("mountinfo")).unwrap();
    assert!(!mounts.contains("rootfs/2") && mounts.contains("rootfs/1"), "{mounts}");
}

#[test]
fn no_name_leads_out_of_the_share() {
    let host = TempDir::new().unwrap();
    let (inside, outside) = (host.path().join("inside"), host.path().join("outside"));
    fs::create_dir(&inside).unwrap();
    fs::write(&outside, "secret").unwrap();
    symlink(&outside, inside.join("absolute")).unwrap();
    symlink("../outside", inside.join("relative")).unwrap();
    symlink("..", inside.join("up")).unwrap();
    let (daemon, mut guest) = boot(&[export("box/rootfs", &inside)]);
    let root = guest.find("box/rootfs").unwrap();
    for name in ["absolute", "relative", "up"] {
        let link = guest.look_up(root.node, name).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK, "{name}");
        assert_eq!(guest.open(link.node, libc::O_RDONLY), Err(libc::EBADF), "{name}");
    }
    let link = guest.find("box/rootfs/relative").unwrap();
    assert_eq!(guest.request(READLINK, link.node, &[]).unwrap(), b"../outside");

    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let known = [inode(&inside), inode(&serving_thread(&daemon).join("root"))];
    for name in ["..", "../..", "/", "/proc/self/root"] {
        for node in [root.node, ROOT] {
            if let Ok(found) = guest.look_up(node, name) {
                assert!(known.contains(&found.inode), "{name} leads to {found:?}");
            }
        }
    }
    for name in ["up/outside", "../outside", "../../outside", "absolute/../outside"] {
        assert!(guest.look_up(root.node, name).is_err(), "{name}");
        assert!(guest.request(UNLINK, root.node, &c_string(name)).is_err(), "{name}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "secret");
}

#[test]
fn attributes_of_security_modules_are_not_the_guests() {
    let host = TempDir::new().unwrap();
    fs::write(host.path().join("file"), "").unwrap();
    let (_daemon, mut guest) = boot(&[export("box/rootfs", host.path())]);
    let file = guest.find("box/rootfs/file").unwrap();
    let mut set = |name: &str| {
        let arguments = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &c_string(name), b"x"].concat();
        guest.request(SETXATTR, file.node, &arguments).map(drop)
    };
    assert_eq!(set("security.selinux"), Err(libc::ENOTSUP));
    assert_eq!(set("user.virtiofs.trusted.x"), Err(libc::EPERM));
    // The guest's overlays need these; the host keeps them under another name.
    assert_eq!(set("trusted.overlay.opaque"), Ok(()));
    let mut value = [0; 8];
    let path = host.path().join("file");
    let length = rustix::fs::getxattr(&path, "user.virtiofs.trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..length], b"x");
}

#[test]
fn what_is_mounted_below_a_volume_later_arrives() {
    in_mount_namespace(|| {
        let host = TempDir::new().unwrap();
        let volume = host.path().join("volume");
        fs::create_dir_all(volume.join("disk")).unwrap();
        let (_daemon, mut guest) = boot(&[export("box/mounts/0", &volume)]);
        mount_tmpfs(&volume.join("disk"));
        fs::write(volume.join("disk/file"), "late").unwrap();
        assert_eq!(guest.cat("box/mounts/0/disk/file").unwrap(), "late");
    });
}

#[test]
fn a_read_only_volume_is_so_to_its_depth_and_only_there() {
    in_mount_namespace(|| {
        let host = TempDir::new().unwrap();
        fs::create_dir(host.path().join("disk")).unwrap();
        mount_tmpfs(&host.path().join("disk"));
        let (_daemon, mut guest) = boot(&[
            Export { read_only: true, ..export("box/mounts/0", host.path()) },
            Export { recursive: false, ..export("box/mounts/1", host.path()) },
        ]);
        let below = guest.find("box/mounts/0/disk").unwrap();
        assert_eq!(guest.create(below.node, "new"), Err(libc::EROFS));
        fs::write(host.path().join("disk/file"), "still mine").unwrap();
        assert_eq!(guest.cat("box/mounts/0/disk/file").unwrap(), "still mine");
        assert_eq!(guest.find("box/mounts/1/disk/file"), Err(libc::ENOENT), "not what is mounted there");
    });
}

/// Runs a test in a mount namespace of its own, whose mounts are shared as a host's are.
fn in_mount_namespace(test: impl FnOnce()) {
    use rustix::mount::{MountPropagationFlags, mount_change};
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
    test();
}

fn mount_tmpfs(path: &Path) {
    rustix::mount::mount("none", path, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
}

#[test]
fn what_cannot_be_shared_is_named() {
    let host = TempDir::new().unwrap();
    let missing = host.path().join("missing");
    let error = refusal(&[export("box/rootfs", &missing)]);
    assert_eq!(error, format!("cannot share {}: No such file or directory (os error 2)", missing.display()));
    for path in ["", "/box", "box/..", "../box", "box/./x/../y"] {
        let error = refusal(&[export(path, host.path())]);
        assert!(error.starts_with(&format!("{path} is no place in a share")), "{error}");
    }
    let nested = [export("box", host.path()), export("box/rootfs", host.path())];
    assert!(refusal(&nested).starts_with("box/rootfs is no place"));
    let twice = [export("box", host.path()), export("box", host.path())];
    assert!(refusal(&twice).starts_with("box is no place"));
}

#[test]
fn the_daemon_keeps_only_what_it_needs() {
    let host = TempDir::new().unwrap();
    // Inherited by mistake, as an engine may do.
    let stray = fs::File::open("/etc/passwd").unwrap();
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
    let (daemon, _guest) = boot(&[export("box/rootfs", host.path())]);
    let thread = serving_thread(&daemon);
    let status = fs::read_to_string(thread.join("status")).unwrap();
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
    let kept = [0, 1, 3, 4, 6, 7, 27, 31].map(|number| 1u64 << number).iter().sum::<u64>();
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert!(status.contains(&format!("{set}:\t{kept:016x}\n")), "{set}: {status}");
    }
    for line in ["CapInh:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    for namespace in ["ns/mnt", "ns/net", "ns/ipc", "ns/uts"] {
        let of = |path: &Path| fs::read_link(path.join(namespace)).unwrap();
        assert_ne!(of(&thread), of(Path::new("/proc/self")), "{namespace}");
    }
    for descriptor in fs::read_dir(thread.join("fd")).unwrap() {
        let target = fs::read_link(descriptor.unwrap().path()).unwrap();
        assert_ne!(target, Path::new("/etc/passwd"));
    }
    let mounts = fs::read_to_string(thread.join("mountinfo")).unwrap();
    let mounts: Vec<_> = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).collect();
    assert_eq!(mounts.iter().map(|fields| fields[4]).collect::<BTreeSet<_>>(), BTreeSet::from(["/", "/box/rootfs"]));
    for fields in mounts {
        for option in ["nosuid", "nodev", "noexec", "nosymfollow"] {
            assert!(fields[5].split(',').any(|set| set == option), "{option}: {fields:?}");
        }
    }
}

#[test]
fn the_daemon_ends_with_its_connection() {
    let host = TempDir::new().unwrap();
    let (daemon, guest) = boot(&[export("box/rootfs", host.path())]);
    drop(guest);
    assert!(has_ended(&daemon));
    // Or with a client that never spoke.
    let mut daemon = spawn_daemon(&[export("box/rootfs", host.path())]);
    drop(daemon.connect().unwrap());
    assert!(has_ended(&daemon));
}

#[test]
fn nonsense_is_refused() {
    let host = TempDir::new().unwrap();
    let (_daemon, mut guest) = boot(&[export("box/rootfs", host.path())]);
    assert_eq!(guest.request(9999, ROOT, &[]), Err(libc::ENOSYS));
    assert_eq!(guest.look_up(4711, "x"), Err(libc::EBADF));
    assert_eq!(guest.open(4711, libc::O_RDONLY), Err(libc::EBADF));
    let Entry { node, .. } = guest.find("box/rootfs").unwrap();
    assert_eq!(guest.look_up(node, &"x".repeat(300)), Err(libc::ENAMETOOLONG));
}

#[test]
fn a_broken_request_ends_the_daemon_and_nothing_else() {
    let host = TempDir::new().unwrap();
    // A header that promises more than it has; a name without an end; a request outside the guest's memory.
    let short = [[39u32, 1].map(u32::to_le_bytes).concat(), vec![0; 32]].concat();
    let endless = [[44u32, 1].map(u32::to_le_bytes).concat(), vec![0; 32], b"name".to_vec()].concat();
    for (request, address) in [(short, 0x1_0000), (endless, 0x1_0000), (vec![0; 64], u64::MAX - 16)] {
        let (daemon, mut guest) = boot(&[export("box/rootfs", host.path())]);
        guest.send(&request, address);
        assert!(has_ended(&daemon));
    }
}
