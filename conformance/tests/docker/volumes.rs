//! Files of the host, and file systems of the container's own.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Result, ensure};
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(a_folder_is_shared_both_ways).tcg(),
        case!(a_change_on_the_host_is_seen_inside),
        case!(a_read_only_folder_shows_changes_at_once).tcg(),
        case!(a_file_is_shared_both_ways),
        case!(a_read_only_folder_cannot_be_written),
        case!(a_read_only_file_cannot_be_written),
        case!(owners_modes_and_links_are_kept),
        case!(a_big_file_arrives_whole),
        case!(a_volume_outlives_its_container),
        case!(a_volume_begins_with_the_images_files),
        case!(volumes_of_another_container),
        case!(a_tmpfs_has_its_size_and_options),
        case!(a_read_only_root_cannot_be_written),
        case!(a_mount_inside_a_mount),
        case!(the_engines_own_files_are_there),
        case!(writes_of_a_mapped_file_arrive),
        case!(renames_locks_and_sockets_work),
        case!(what_is_open_stays_readable),
        case!(a_folder_that_is_open_stays_readable),
        case!(what_is_made_exclusively_was_not_there),
        case!(one_of_many_makes_a_file),
    ]
}

fn a_folder_is_shared_both_ways(d: &Docker) -> Result<Outcome> {
    d.file("from-host", "from the host\n")?;
    let folder = d.folder()?;
    let options = format!("--volume {}:/shared", folder.display());
    let output =
        d.sh(&options, "cat /shared/from-host; echo from inside >/shared/from-inside; mkdir /shared/a").run()?;
    expect_equal("inside", output.text(), "from the host")?;
    expect_equal("outside", std::fs::read_to_string(folder.join("from-inside"))?.as_str(), "from inside\n")?;
    ensure!(folder.join("a").is_dir(), "the folder made inside is not there outside");
    Ok(Outcome::new().see_output("run", &output))
}

fn a_change_on_the_host_is_seen_inside(d: &Docker) -> Result<Outcome> {
    let path = d.file("changing", "first\n")?;
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let container = d.start("", &["true"])?;
    container.wait()?;
    let container = d.start_sh(
        &options,
        // What a guest knows of a file it may believe for a second.
        "cat /shared/changing; until [ -e /shared/go ]; do sleep 0.1; done; sleep 1; cat /shared/changing",
    )?;
    container.expect_log("first")?;
    std::fs::write(path, "second, and longer\n")?;
    d.file("go", "")?;
    let code = container.wait()?;
    let logs = container.docker("logs").ok()?;
    expect_equal("the log", logs.text(), "first\nsecond, and longer")?;
    Ok(Outcome::new().see("code", code).see_output("logs", &logs))
}

/// The way in which Kubernetes changes a configuration: the files are in a folder that a link leads to, and another link
/// takes its place.
fn a_read_only_folder_shows_changes_at_once(d: &Docker) -> Result<Outcome> {
    let folder = d.folder()?;
    let publish = |version: &str| -> Result<()> {
        std::fs::create_dir(folder.join(version))?;
        d.file(&format!("{version}/key"), version)?;
        std::os::unix::fs::symlink(version, folder.join("next"))?;
        Ok(std::fs::rename(folder.join("next"), folder.join("data"))?)
    };
    publish("v0")?;
    std::os::unix::fs::symlink("data/key", folder.join("key"))?;
    let container = d.start_sh(&format!("--interactive --volume {}:/config:ro", folder.display()), "cat")?;
    let mut seen = vec![container.exec("", &["cat", "/config/key"]).ok()?.text().to_owned()];
    for version in ["v1", "v2", "v3"] {
        publish(version)?;
        seen.push(container.exec("", &["cat", "/config/key"]).ok()?.text().to_owned());
    }
    let seen = seen.join(" ");
    expect_equal("what was read", seen.as_str(), "v0 v1 v2 v3")?;
    Ok(Outcome::new().see("read", seen))
}

fn a_file_is_shared_both_ways(d: &Docker) -> Result<Outcome> {
    let path = d.file("file", "from the host\n")?;
    let output = d
        .sh(&format!("--volume {path}:/etc/one.conf"), "cat /etc/one.conf; echo more >>/etc/one.conf; ls /etc/passwd")
        .run()?;
    expect_equal("inside", output.text(), "from the host\n/etc/passwd")?;
    let content = std::fs::read_to_string(path)?;
    expect_equal("outside", content.as_str(), "from the host\nmore\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_folder_cannot_be_written(d: &Docker) -> Result<Outcome> {
    d.file("kept", "kept\n")?;
    let options = format!("--volume {}:/shared:ro", d.folder()?.display());
    let output = d
        .sh(&options, "cat /shared/kept; echo x >/shared/new; echo x >/shared/kept; rm /shared/kept; mkdir /shared/d")
        .run()?;
    ensure!(output.stderr.matches("Read-only file system").count() == 4, "a write went through: {}", output.stderr);
    expect_equal("the file", std::fs::read_to_string(d.folder()?.join("kept"))?.as_str(), "kept\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_file_cannot_be_written(d: &Docker) -> Result<Outcome> {
    let path = d.file("file", "kept\n")?;
    let output = d.sh(&format!("--volume {path}:/file:ro"), "cat /file; echo x >/file").run()?;
    ensure!(output.stderr.contains("Read-only file system"), "the write went through: {}", output.stderr);
    expect_equal("the file", std::fs::read_to_string(path)?.as_str(), "kept\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn owners_modes_and_links_are_kept(d: &Docker) -> Result<Outcome> {
    let folder = d.folder()?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777))?;
    d.file("private", "secret\n")?;
    std::fs::set_permissions(folder.join("private"), std::fs::Permissions::from_mode(0o600))?;
    let script = "cat /s/private; echo mine >/s/mine; chmod 640 /s/mine; ln -s mine /s/link; ln /s/mine /s/hard; mkfifo /s/fifo; stat -c '%n %a %u %g %h %F' /s/*";
    let output = d.sh(&format!("--user 1000:50 --volume {}:/s", folder.display()), script).run()?;
    ensure!(output.stderr.contains("Permission denied"), "another's private file was read: {}", output.stdout);
    let mine = std::fs::metadata(folder.join("mine"))?;
    expect_equal("owner", (mine.uid(), mine.gid(), mine.mode() & 0o7777, mine.nlink()), (1000, 50, 0o640, 2))?;
    expect_equal("link", std::fs::read_link(folder.join("link"))?.as_path(), std::path::Path::new("mine"))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_big_file_arrives_whole(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let script = "head -c 100m /dev/urandom >/shared/big; sync; sha256sum </shared/big";
    let inside = d.sh(&options, script).ok()?;
    let outside = conformance::Cmd::new("sha256sum").arg(d.folder()?.join("big")).ok()?;
    expect_equal("sum", inside.text().split(' ').next(), outside.text().split(' ').next())?;
    Ok(Outcome::new().see("exit", inside.code))
}

fn a_volume_outlives_its_container(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/data", d.volume()?);
    d.sh(&options, "echo kept >/data/file").ok()?;
    let output = d.sh(&options, "cat /data/file").run()?;
    expect_equal("output", output.text(), "kept")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_volume_begins_with_the_images_files(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/etc", d.volume()?);
    let output = d.sh(&options, "grep -c root /etc/passwd; echo x >/etc/new && ls /etc").run()?;
    ensure!(output.stdout.contains("passwd"), "the image's files are not there: {}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn volumes_of_another_container(d: &Docker) -> Result<Outcome> {
    let first = d.start_sh("--volume /data", "echo one >/data/file")?;
    first.wait()?;
    let output = d.run(&format!("--volumes-from {}", first.id), &["cat", "/data/file"]).run()?;
    expect_equal("output", output.text(), "one")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_tmpfs_has_its_size_and_options(d: &Docker) -> Result<Outcome> {
    let script = "df -k /scratch | tail -n 1 | awk '{ print $1, $2 }'; stat -c %a /scratch;
                  grep ' /scratch ' /proc/mounts | tr ' ,' '\\n\\n' | grep -E '^(no|rw|ro|size)';
                  cp /bin/busybox /scratch/true; /scratch/true; dd if=/dev/zero of=/scratch/big bs=1M count=20 2>&1 | grep -o 'No space.*'";
    let output = d.sh("--tmpfs /scratch:size=8m,mode=1770,noexec", script).run()?;
    ensure!(output.stdout.contains("No space"), "the size does not hold: {}", output.stdout);
    ensure!(output.stderr.contains("Permission denied"), "noexec does not hold: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_root_cannot_be_written(d: &Docker) -> Result<Outcome> {
    let script = "echo x >/new; echo x >/etc/passwd; echo x >/tmp/x && cat /tmp/x; echo x >/dev/shm/x && echo shm; cat /etc/hostname | wc -l";
    let output = d.sh("--read-only --tmpfs /tmp", script).run()?;
    ensure!(output.stderr.matches("Read-only file system").count() == 2, "a write went through: {}", output.stderr);
    expect_equal("where writing is allowed", output.text(), "x\nshm\n1")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_mount_inside_a_mount(d: &Docker) -> Result<Outcome> {
    let outer = d.folder()?.join("outer");
    let inner = d.folder()?.join("inner");
    for (folder, content) in [(&outer, "outer\n"), (&inner, "inner\n")] {
        std::fs::create_dir(folder)?;
        std::fs::write(folder.join("file"), content)?;
    }
    std::fs::create_dir(outer.join("sub"))?;
    let options = format!("--volume {}:/m:ro --volume {}:/m/sub", outer.display(), inner.display());
    let output = d.sh(&options, "cat /m/file /m/sub/file; echo x >/m/sub/new; echo x >/m/new").run()?;
    ensure!(inner.join("new").exists() && !outer.join("new").exists(), "the mounts are mixed up");
    Ok(Outcome::new().see_output("run", &output))
}

fn the_engines_own_files_are_there(d: &Docker) -> Result<Outcome> {
    let script = "cat /etc/hostname; tail -n 1 /etc/hosts | tr '\\t' ' ' | cut -d ' ' -f 2-; grep -v '^#' /etc/resolv.conf; grep other /etc/hosts";
    let output = d.sh("--hostname named --add-host other:192.0.2.77 --dns-search rvm.example", script).run()?;
    ensure!(output.stdout.starts_with("named\n"), "no host name: {}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn writes_of_a_mapped_file_arrive(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let script = "
import mmap
with open('/shared/mapped', 'w+b') as f:
    f.truncate(8192)
    with mmap.mmap(f.fileno(), 8192) as m:
        m[4096:4101] = b'there'
        m.flush()
print('done')";
    let output = d.run_debian(&options, &["python3", "-c", script])?.run()?;
    let content = std::fs::read(d.folder()?.join("mapped")).unwrap_or_default();
    ensure!(content.len() == 8192 && &content[4096..4101] == b"there", "the host does not see it: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn renames_locks_and_sockets_work(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let script = "
import fcntl, os, socket
os.chdir('/shared')
open('old', 'w').write('x'); open('new', 'w').write('y')
os.rename('old', 'new'); print(open('new').read(), sorted(os.listdir()))
first, second = open('new'), open('new')
fcntl.flock(first, fcntl.LOCK_EX)
try: fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as e: print('locked:', e.strerror)
server = socket.socket(socket.AF_UNIX); server.bind('sock'); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect('sock'); print('connected')
f = open('gone', 'w+'); os.unlink('gone'); f.write('still'); f.seek(0); print(f.read())
os.setxattr('new', 'user.name', b'value'); print(os.getxattr('new', 'user.name'))
os.posix_fallocate(os.open('new', os.O_RDWR), 0, 10000); print(os.stat('new').st_size)";
    let output = d.run_debian(&options, &["python3", "-c", script])?.run()?;
    ensure!(output.stdout.contains("connected\nstill"), "{}{}", output.stdout, output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

/// Nothing was read of the files before their names, modes and owners changed.
fn what_is_open_stays_readable(d: &Docker) -> Result<Outcome> {
    for name in ["gone", "moved", "closed", "others", "copied", "mapped"] {
        d.file(name, format!("what {name} had"))?;
    }
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let script = "
import mmap, os
os.chdir('/shared')
names = ['gone', 'moved', 'closed', 'copied', 'mapped']
files = {name: os.open(name, os.O_RDONLY) for name in names}
opened, changed = os.pipe(), os.pipe()
if os.fork() == 0:
    os.setuid(65534)
    other = os.open('others', os.O_RDONLY)
    os.write(opened[1], b'x')
    os.read(changed[0], 1)
    os.write(opened[1], os.read(other, 100))
    os._exit(0)
os.read(opened[0], 1)
os.unlink('gone'); os.rename('moved', 'there'); os.chmod('closed', 0); os.chmod('others', 0)
os.write(changed[1], b'x')
print(os.read(opened[0], 100), [os.read(files[name], 100) for name in names[:3]])
to = os.open('copy', os.O_RDWR | os.O_CREAT)
print(os.copy_file_range(files['copied'], to, 100), os.pread(to, 100, 0), os.lseek(files['copied'], 0, os.SEEK_DATA))
print(mmap.mmap(files['mapped'], 0, prot=mmap.PROT_READ)[:], os.fstat(files['gone']).st_nlink)
os.fsync(files['mapped']); os.utime(files['mapped'], (1, 1)); print(os.stat('mapped').st_mtime)
try: os.write(files['mapped'], b'x')
except OSError as e: print(e.strerror)";
    let output = d.run_debian(&options, &["python3", "-c", script])?.ok()?;
    Ok(Outcome::new().see_output("run", &output))
}

/// Nothing was read of the folders before their names, modes and contents changed.
fn a_folder_that_is_open_stays_readable(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let script = "
import os, shutil
os.chdir('/shared')
def make(path): os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
for name in ['read', 'moved', 'closed', 'synced', 'others', 'gone']: os.mkdir(name)
for name in ['read', 'moved', 'closed', 'synced', 'others']: make(name + '/file')
names = ['read', 'moved', 'closed', 'synced', 'gone']
folders = {name: os.open(name, os.O_RDONLY | os.O_DIRECTORY) for name in names}
opened, changed = os.pipe(), os.pipe()
if os.fork() == 0:
    os.setuid(65534)
    other = os.open('others', os.O_RDONLY)
    os.write(opened[1], b'x')
    os.read(changed[0], 1)
    os.write(opened[1], ' '.join(os.listdir(other)).encode())
    os._exit(0)
os.read(opened[0], 1)
os.rename('moved', 'there'); os.chmod('closed', 0); os.chmod('others', 0); os.rmdir('gone'); make('read/later')
os.write(changed[1], b'x')
print(os.read(opened[0], 100), [sorted(os.listdir(folders[name])) for name in names[:3]])
os.fsync(folders['synced']); make('synced/later'); print(sorted(os.listdir(folders['synced'])))
try: print(os.listdir(folders['gone']))
except OSError as e: print(e.strerror)
try: os.mkdir('/shared')
except OSError as e: print(e.strerror)
os.mkdir('many')
for number in range(1500): make('many/' + str(number))
print(len(os.listdir('many'))); shutil.rmtree('many'); print(os.path.exists('many'))";
    let output = d.run_debian(&options, &["python3", "-c", script])?.ok()?;
    Ok(Outcome::new().see_output("run", &output))
}

fn what_is_made_exclusively_was_not_there(d: &Docker) -> Result<Outcome> {
    d.file("there", "mine")?;
    let folder = d.folder()?;
    let options = format!("--volume {0}:/shared --volume {0}:/fixed:ro", folder.display());
    let script = "
import os
os.umask(0o022)
def make(path, mode=0o666):
    try: return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as e: print(path, e.strerror)
os.chdir('/shared')
os.symlink('nowhere', 'link'); os.mkdir('folder'); os.mkdir('closed', 0o700); os.chmod('.', 0o755)
for path in ['there', 'link', 'folder', 'none/new', 'there/new', 'x' * 256, '/fixed/there', '/fixed/new']: make(path)
for mode in [0o666, 0o6755]:
    new = make('new', mode); make('new')
    before = oct(os.fstat(new).st_mode)
    if os.fork() == 0:
        os.setuid(65534)
        make('there'); make('other'); make('closed/new')
        os.write(new, b'content'); os._exit(0)
    os.wait()
    print(before, oct(os.fstat(new).st_mode), open('new').read()); os.unlink('new')
print(sorted(os.listdir()), open('there').read())";
    let output = d.run_debian(&options, &["python3", "-c", script])?.ok()?;
    Ok(Outcome::new().see_output("run", &output))
}

/// Four processes make, fill and remove the same files, as they can.
fn one_of_many_makes_a_file(d: &Docker) -> Result<Outcome> {
    let options = format!("--volume {}:/shared", d.folder()?.display());
    let script = "
import os
os.chdir('/shared')
def made():
    count = 0
    for number in range(500):
        try: file = os.open('file' + str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError: continue
        os.write(file, b'content'); os.close(file); count += 1
    return count
def removed():
    count = 0
    for number in range(500):
        try: os.unlink('file' + str(number)); count += 1
        except FileNotFoundError: pass
    return count
for work in [made, removed, made]:
    read, write = os.pipe()
    for _ in range(4):
        if os.fork() == 0:
            os.write(write, str(work()).encode() + b' '); os._exit(0)
    for _ in range(4): os.wait()
    print(sum(map(int, os.read(read, 100).split())), len(os.listdir()))
print({open(name).read() for name in os.listdir()})";
    let output = d.run_debian(&options, &["python3", "-c", script])?.ok()?;
    let files = std::fs::read_dir(d.folder()?)?.count();
    ensure!(files == 500, "the host sees {files}");
    Ok(Outcome::new().see_output("run", &output))
}
