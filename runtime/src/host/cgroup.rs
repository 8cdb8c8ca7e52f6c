//! The host's cgroup of a container: it holds the monitor, the VMM and the virtio-fs daemon, so that engines find the
//! container's use there, and so that a guest cannot take more of the host than its limits and what a VM needs.
//!
//! Only the controllers that are limited or read by engines are joined: each further hierarchy of version 1 makes a
//! start slower. The container's own limits are set within the guest as well.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use oci_spec::runtime::{LinuxBlockIo, LinuxResources, Spec};
use rustix::process::Signal;
use thiserror::Error;

use super::block_io;
use super::process::ProcessIdentity;

/// The hierarchies of version 1 that each container joins where they are mounted.
const V1_CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "memory", "blkio", "pids"];
/// What the VM needs on the host besides the guest's memory: the VMM, the daemon, page tables, file caches.
const MEMORY_OVERHEAD: i64 = 256 << 20;
/// A thread that moves itself is moved at once. Before the kernel moves a process it waits until no other process is
/// being forked, for 10 ms and more; version 2 knows nothing else.
const V1_LIST: &str = "tasks";
const V2_LIST: &str = "cgroup.procs";
/// How long a killed process of a cgroup may take to go.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A file of a cgroup that cannot be written.
#[derive(Debug, Error)]
#[error("cannot write the host's cgroup: {path}", path = path.display())]
pub struct CgroupError {
    path: PathBuf,
    source: io::Error,
}

/// The folders of one container's cgroup, one for each hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    folders: Vec<PathBuf>,
    /// The file by which a process joins.
    list: &'static str,
}

impl Cgroup {
    /// Makes the cgroup that `linux.cgroupsPath` names (or `runvm-ID`), with its limits. `guest_memory` is the VM's, in
    /// bytes: of a limited container the host's limit must hold all of it.
    ///
    /// # Errors
    /// [`CgroupError`], naming the file.
    pub fn create(spec: &Spec, id: &str, guest_memory: u64) -> Result<Self, CgroupError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        Self::create_at(&relative_path(named(spec), id), resources, guest_memory)
    }

    /// Makes the cgroup of the container `id` below `parent`, which is in one of the forms of `linux.cgroupsPath`, without
    /// limits of its own.
    ///
    /// # Errors
    /// [`CgroupError`], naming the file.
    pub fn create_below(parent: &str, id: &str) -> Result<Self, CgroupError> {
        Self::create_at(&path_below(parent, id), None, 0)
    }

    fn create_at(path: &Path, resources: Option<&LinuxResources>, guest_memory: u64) -> Result<Self, CgroupError> {
        let hierarchies = Hierarchies::mounted();
        match hierarchies.v1.is_empty() {
            false => hierarchies.create_v1(path, resources, guest_memory),
            true => hierarchies.create_v2(path, resources, guest_memory),
        }
    }

    /// The cgroup that [`Self::create`] makes, if it is there.
    pub fn find(spec: &Spec, id: &str) -> Vec<PathBuf> {
        Self::find_at(&relative_path(named(spec), id))
    }

    /// The cgroup that [`Self::create_below`] makes, if it is there.
    pub fn find_below(parent: &str, id: &str) -> Vec<PathBuf> {
        Self::find_at(&path_below(parent, id))
    }

    fn find_at(path: &Path) -> Vec<PathBuf> {
        let hierarchies = Hierarchies::mounted();
        let mount_points = hierarchies.v1.iter().map(|(_, mount_point)| mount_point).chain(&hierarchies.v2);
        let mut folders: Vec<_> = mount_points.map(|mount_point| mount_point.join(path)).collect();
        folders.retain(|folder| folder.is_dir());
        folders.sort();
        folders.dedup();
        folders
    }

    /// Has the command's process be born into the cgroup, and with it what that starts. To be called before the
    /// command's descriptors are arranged.
    ///
    /// # Errors
    /// [`CgroupError`], naming the file.
    pub fn adopt(&self, command: &mut Command) -> Result<(), CgroupError> {
        let open = |folder: &PathBuf| {
            let path = folder.join(self.list);
            File::options().write(true).open(&path).map_err(|source| CgroupError { path, source })
        };
        let lists = self.folders.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let join = move || {
            let mut lists = lists.iter();
            lists.try_for_each(|list| rustix::io::write(list, b"0").map(drop).map_err(io::Error::from))
        };
        // SAFETY: between fork and exec `join` makes system calls only, it allocates nothing and takes no lock.
        unsafe { command.pre_exec(join) };
        Ok(())
    }

    /// Moves the calling thread, which is to be its process's only one, into it.
    ///
    /// # Errors
    /// [`CgroupError`], naming the file.
    pub fn join(&self) -> Result<(), CgroupError> {
        self.folders.iter().try_for_each(|folder| write(&folder.join(self.list), "0"))
    }

    /// The folders, for the record.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }
}

/// Changes the limits of the cgroup with these folders, which are complemented where a limit needs one more. `guest_memory`
/// is as for [`Cgroup::create`].
///
/// # Errors
/// [`CgroupError`], naming the file.
pub fn update(folders: &mut Vec<PathBuf>, resources: &LinuxResources, guest_memory: u64) -> Result<(), CgroupError> {
    let limits = Limits::new(Some(resources), guest_memory);
    let hierarchies = Hierarchies::mounted();
    if hierarchies.v1.is_empty() {
        return folders.first().map_or(Ok(()), |folder| limits.write_v2(folder));
    }
    for (controller, mount_point) in &hierarchies.v1 {
        let mut files = limits.v1(controller).peekable();
        if files.peek().is_none() {
            continue;
        }
        let folder = match folders.iter().find(|folder| folder.starts_with(mount_point)) {
            Some(folder) => folder.clone(),
            None => join_late(folders, &hierarchies, mount_point)?,
        };
        files.try_for_each(|(file, value)| write(&folder.join(file), &value))?;
    }
    Ok(())
}

/// Has a cgroup's processes join a hierarchy of version 1 that nothing was limited by when they began.
fn join_late(
    folders: &mut Vec<PathBuf>,
    hierarchies: &Hierarchies,
    mount_point: &Path,
) -> Result<PathBuf, CgroupError> {
    let joined = folders.iter().find_map(|folder| {
        let (_, mount_point) = hierarchies.v1.iter().find(|(_, mount_point)| folder.starts_with(mount_point))?;
        Some((folder, folder.strip_prefix(mount_point).ok()?))
    });
    let Some((sibling, path)) = joined else {
        return Err(CgroupError { path: mount_point.to_owned(), source: io::ErrorKind::NotFound.into() });
    };
    let (sibling, folder) = (sibling.clone(), mount_point.join(path));
    make(&folder)?;
    folders.push(folder.clone());
    inherit_cpuset(mount_point, &folder)?;
    for process in processes(&sibling) {
        write(&folder.join(V2_LIST), &process.pid.to_string())?;
    }
    Ok(folder)
}

/// Ends what is left in the folders, and removes them.
///
/// # Errors
/// [`CgroupError`] for a folder that stays.
pub fn remove(folders: &[PathBuf]) -> Result<(), CgroupError> {
    for folder in folders {
        for process in processes(folder) {
            // What cannot be ended shows in the removal.
            let _ = process.signal(Signal::KILL).and_then(|()| process.await_end(END_LIMIT));
        }
        match fs::remove_dir(folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(CgroupError { path: folder.clone(), source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn processes(folder: &Path) -> Vec<ProcessIdentity> {
    let list = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    list.lines().filter_map(|pid| ProcessIdentity::of(pid.parse().ok()?)).collect()
}

/// `linux.cgroupsPath`.
fn named(spec: &Spec) -> &str {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    path.and_then(|path| path.to_str()).unwrap_or_default()
}

fn path_below(parent: &str, id: &str) -> PathBuf {
    let path = match parent.ends_with(".slice") {
        true => format!("{parent}:runvm:{id}"),
        false => format!("{parent}/{id}"),
    };
    relative_path(&path, id)
}

/// The path below a hierarchy's mount point. It is the engine's word: `..` has no place in it.
fn relative_path(text: &str, id: &str) -> PathBuf {
    // systemd's form, slice:prefix:name.
    let path = match text.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => format!("{}/{prefix}-{name}.scope", expanded(slice)),
        _ => text.to_owned(),
    };
    let path: PathBuf =
        Path::new(&path).components().filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
    if path.as_os_str().is_empty() { PathBuf::from(format!("runvm-{id}")) } else { path }
}

/// The folder of a slice of systemd's: `a-b.slice` lies in `a.slice`, see systemd.slice(5).
fn expanded(slice: &str) -> String {
    let name = slice.strip_suffix(".slice").unwrap_or(slice).trim_matches('-');
    let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]).filter(|&end| end > 0);
    ends.map(|end| format!("{}.slice", &name[..end])).collect::<Vec<_>>().join("/")
}

struct Hierarchies {
    /// Controllers and where version 1 mounts them.
    v1: Vec<(String, PathBuf)>,
    v2: Option<PathBuf>,
}

impl Hierarchies {
    fn mounted() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Reads the hierarchies from mountinfo, see proc_pid_mountinfo(5).
    fn parse(mountinfo: &str) -> Self {
        let mut found = Self { v1: Vec::new(), v2: None };
        for line in mountinfo.lines() {
            let Some((mount, file_system)) = line.split_once(" - ") else { continue };
            let Some(mount_point) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut fields = file_system.split(' ');
            match (fields.next(), fields.nth(1)) {
                (Some("cgroup2"), _) => found.v2 = Some(mount_point),
                (Some("cgroup"), Some(options)) => {
                    for option in options.split(',') {
                        if V1_CONTROLLERS.contains(&option) || option == "cpuset" {
                            found.v1.push((option.to_owned(), mount_point.clone()));
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }

    fn create_v1(
        &self,
        path: &Path,
        resources: Option<&LinuxResources>,
        guest_memory: u64,
    ) -> Result<Cgroup, CgroupError> {
        let limits = Limits::new(resources, guest_memory);
        let mut folders = Vec::new();
        for (controller, mount_point) in &self.v1 {
            if controller == "cpuset" && limits.cpus.is_none() && limits.mems.is_none() {
                continue;
            }
            let folder = mount_point.join(path);
            make(&folder)?;
            if controller == "cpuset" {
                inherit_cpuset(mount_point, &folder)?;
            }
            limits.v1(controller).try_for_each(|(file, value)| write(&folder.join(file), &value))?;
            if let Some(disks) = block_io(resources).filter(|_| controller == "blkio") {
                block_io::v1(disks).iter().try_for_each(|(file, line)| write(&folder.join(file), line))?;
            }
            // Controllers mounted together share their folder.
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        Ok(Cgroup { folders, list: V1_LIST })
    }

    fn create_v2(
        &self,
        path: &Path,
        resources: Option<&LinuxResources>,
        guest_memory: u64,
    ) -> Result<Cgroup, CgroupError> {
        let Some(mount_point) = &self.v2 else { return Ok(Cgroup { folders: Vec::new(), list: V2_LIST }) };
        let folder = mount_point.join(path);
        make(&folder)?;
        for parent in folder.ancestors().skip(1).take_while(|parent| parent.starts_with(mount_point)) {
            // A parent with processes of its own cannot hand on controllers; then their limits are the parent's.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+cpu +memory +cpuset +io +pids");
        }
        Limits::new(resources, guest_memory).write_v2(&folder)?;
        if let Some(disks) = block_io(resources) {
            block_io::v2(disks).iter().try_for_each(|(file, line)| write(&folder.join(file), line))?;
        }
        Ok(Cgroup { folders: vec![folder], list: V2_LIST })
    }
}

fn block_io(resources: Option<&LinuxResources>) -> Option<&LinuxBlockIo> {
    resources.and_then(|resources| resources.block_io().as_ref())
}

/// A new cpuset of version 1 is empty, and takes no process before it has processors and memory nodes.
fn inherit_cpuset(mount_point: &Path, folder: &Path) -> Result<(), CgroupError> {
    let below: Vec<_> = folder.ancestors().take_while(|path| path != &mount_point).collect();
    for path in below.into_iter().rev() {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = path.join(file);
            if fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty()) {
                let parent = path.parent().unwrap_or(mount_point).join(file);
                let value = fs::read_to_string(&parent).map_err(|source| CgroupError { path: parent, source })?;
                write(&own, value.trim())?;
            }
        }
    }
    Ok(())
}

/// The limits that hold on the host.
struct Limits {
    shares: Option<u64>,
    quota: Option<i64>,
    period: Option<u64>,
    cpus: Option<String>,
    mems: Option<String>,
    memory: Option<i64>,
    reservation: Option<i64>,
    swappiness: Option<u64>,
}

impl Limits {
    fn new(resources: Option<&LinuxResources>, guest_memory: u64) -> Self {
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let of_memory = resources.and_then(|resources| resources.memory().as_ref());
        let memory = of_memory.and_then(|memory| memory.limit());
        let guest_memory = i64::try_from(guest_memory).unwrap_or(i64::MAX);
        Self {
            shares: cpu.and_then(|cpu| cpu.shares()).filter(|&shares| shares > 0),
            quota: cpu.and_then(|cpu| cpu.quota()).filter(|&quota| quota != 0),
            period: cpu.and_then(|cpu| cpu.period()).filter(|&period| period > 0),
            cpus: cpu.and_then(|cpu| cpu.cpus().clone()).filter(|cpus| !cpus.is_empty()),
            mems: cpu.and_then(|cpu| cpu.mems().clone()).filter(|mems| !mems.is_empty()),
            memory: memory.filter(|&limit| limit != 0).map(|limit| match limit {
                ..0 => -1,
                _ => guest_memory.saturating_add(guest_memory / 16).saturating_add(MEMORY_OVERHEAD),
            }),
            reservation: of_memory.and_then(|memory| memory.reservation()).filter(|&bytes| bytes > 0),
            // Docker's word for no wish is -1.
            swappiness: of_memory.and_then(|memory| memory.swappiness()).filter(|&percent| percent <= 100),
        }
    }

    fn v1(&self, controller: &str) -> impl Iterator<Item = (&'static str, String)> {
        let text = |number: Option<u64>| number.map(|number| number.to_string());
        let files = match controller {
            "cpu" => vec![
                ("cpu.shares", text(self.shares)),
                ("cpu.cfs_period_us", text(self.period)),
                ("cpu.cfs_quota_us", self.quota.map(|quota| quota.to_string())),
            ],
            "cpuset" => vec![("cpuset.cpus", self.cpus.clone()), ("cpuset.mems", self.mems.clone())],
            "memory" => vec![
                ("memory.limit_in_bytes", self.memory.map(|limit| limit.to_string())),
                ("memory.soft_limit_in_bytes", self.reservation.map(|bytes| bytes.to_string())),
                ("memory.swappiness", text(self.swappiness)),
            ],
            _ => Vec::new(),
        };
        files.into_iter().filter_map(|(file, value)| Some((file, value?)))
    }

    /// Writes them into a cgroup of version 2, as far as its parent hands them on.
    fn write_v2(&self, folder: &Path) -> Result<(), CgroupError> {
        let of_now = fs::read_to_string(folder.join("cpu.max")).unwrap_or_default();
        self.v2(&of_now)
            .filter(|(file, _)| folder.join(file).exists())
            .try_for_each(|(file, value)| write(&folder.join(file), &value))
    }

    /// The files of version 2; `cpu_max` is what that has now, of which what is not limited anew stays.
    fn v2(&self, cpu_max: &str) -> impl Iterator<Item = (&'static str, String)> {
        let or_max = |limit: i64| if limit < 0 { "max".to_owned() } else { limit.to_string() };
        let mut now = cpu_max.split_ascii_whitespace().map(str::to_owned);
        let quota = self.quota.map(or_max).or(now.next()).unwrap_or_else(|| "max".to_owned());
        let period = self.period.map(|period| period.to_string()).or(now.next()).unwrap_or_else(|| "100000".to_owned());
        let limited = self.quota.is_some() || self.period.is_some();
        // The mapping of shares (2 to 262,144) to weights (1 to 10,000) that runc and systemd use.
        let weight = self.shares.map(|shares| 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142);
        [
            ("cpu.weight", weight.map(|weight| weight.to_string())),
            ("cpu.max", limited.then(|| format!("{quota} {period}"))),
            ("cpuset.cpus", self.cpus.clone()),
            ("cpuset.mems", self.mems.clone()),
            ("memory.max", self.memory.map(or_max)),
            ("memory.low", self.reservation.map(|bytes| bytes.to_string())),
        ]
        .into_iter()
        .filter_map(|(file, value)| Some((file, value?)))
    }
}

fn make(folder: &Path) -> Result<(), CgroupError> {
    fs::create_dir_all(folder).map_err(|source| CgroupError { path: folder.to_owned(), source })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{linux}}}"#)).unwrap()
    }

    #[test]
    fn paths_stay_below_the_hierarchy() {
        for (path, expected) in [
            (r#"{"cgroupsPath":"/docker/abc"}"#, "docker/abc"),
            (r#"{"cgroupsPath":"system.slice:runvm:abc"}"#, "system.slice/runvm-abc.scope"),
            (r#"{"cgroupsPath":"/../../etc"}"#, "etc"),
            (r#"{"cgroupsPath":"a-b-c.slice:cri:x"}"#, "a.slice/a-b.slice/a-b-c.slice/cri-x.scope"),
            (r#"{"cgroupsPath":"-.slice:cri:x"}"#, "cri-x.scope"),
            ("{}", "runvm-abc"),
        ] {
            assert_eq!(relative_path(named(&spec(path)), "abc"), Path::new(expected));
        }
    }

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let found = Hierarchies::parse(
            "30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
             31 24 0:27 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
             32 24 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        );
        let names: Vec<_> = found.v1.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["cpu", "cpuacct"]);
        assert_eq!(found.v2.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn the_host_leaves_room_for_the_vm() {
        let resources =
            serde_json::from_str(r#"{"memory":{"limit":67108864},"cpu":{"quota":50000,"shares":1024}}"#).unwrap();
        let limits = Limits::new(Some(&resources), 256 << 20);
        assert_eq!(limits.memory, Some((256 << 20) + (16 << 20) + MEMORY_OVERHEAD));
        let v2: Vec<_> = limits.v2("").collect();
        assert_eq!(v2[0], ("cpu.weight", "39".into()));
        assert_eq!(v2[1], ("cpu.max", "50000 100000".into()));
        assert_eq!(limits.v1("pids").count(), 0);
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let limits = |text: &str| Limits::new(Some(&serde_json::from_str(text).unwrap()), 1 << 30);
        let v2 = |text: &str| limits(text).v2("20000 50000").collect::<Vec<_>>();
        assert_eq!(v2(r#"{"cpu":{"period":70000}}"#), [("cpu.max", "20000 70000".into())]);
        assert_eq!(v2(r#"{"cpu":{"quota":-1}}"#), [("cpu.max", "max 50000".into())]);
        assert_eq!(v2(r#"{"memory":{"limit":-1}}"#), [("memory.max", "max".into())]);
        let v1: Vec<_> = limits(r#"{"memory":{"limit":-1}}"#).v1("memory").collect();
        assert_eq!(v1, [("memory.limit_in_bytes", "-1".into())]);
    }

    #[test]
    fn a_cgroup_is_made_joined_and_removed() {
        let id = format!("test-{}", std::process::id());
        let cgroup = Cgroup::create(&spec("{}"), &id, 1 << 30).unwrap();
        let mut sleep = Command::new("sleep");
        cgroup.adopt(sleep.arg("60")).unwrap();
        let mut child = sleep.spawn().unwrap();
        for folder in cgroup.folders() {
            assert_eq!(processes(folder).len(), 1, "{}", folder.display());
        }
        remove(cgroup.folders()).unwrap();
        child.wait().unwrap();
        assert!(cgroup.folders().iter().all(|folder| !folder.exists()));
    }
}
