//! `update`: other limits for a container that runs, in its guest and around its VM.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::pause::Guest;
use crate::error::{Error, Result};
use crate::host::cgroup;
use crate::monitor::Globals;
use crate::sandbox::Size;

/// Changes the limits of a container. As with runc what is not named, or is 0, stays as it is, and so do its devices.
///
/// # Errors
/// [`Error::NotRunning`] where it has no processes; [`Error::TooLarge`] for more memory than its VM has.
pub fn update(globals: &Globals, id: &str, mut resources: LinuxResources) -> Result<()> {
    leave_out_what_stays(&mut resources);
    let mut guest = Guest::locked(globals, id)?;
    let size = guest.container.record.size;
    let inside =
        serde_json::to_vec(&inside(&resources, size)?).map_err(|error| Error::system("write the limits")(error))?;
    let record = &mut guest.container.record;
    let changed = cgroup::update(&mut record.cgroups, &resources, size.memory);
    // Also after an error: a folder that was made is to be removed one day.
    guest.container.save()?;
    changed?;
    guest.ask(async |agent| Ok(agent.update_container(id, inside).await?))
}

/// The limits that a container in a guest of this size gets by an update. As with runc what is not named, or is 0, stays
/// as it is.
///
/// # Errors
/// [`Error::TooLarge`] for more memory than the VM has; [`Error::Usage`].
pub fn limits_of_guest(mut resources: LinuxResources, size: Size) -> Result<LinuxResources> {
    leave_out_what_stays(&mut resources);
    inside(&resources, size)
}

fn leave_out_what_stays(resources: &mut LinuxResources) {
    resources.set_devices(None);
    if let Some(cpu) = resources.cpu_mut() {
        let named = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
        let (cpus, mems) = (named(cpu.cpus()), named(cpu.mems()));
        let (shares, quota, period) = (not_zero(cpu.shares()), not_zero(cpu.quota()), not_zero(cpu.period()));
        let (runtime, rt_period) = (not_zero(cpu.realtime_runtime()), not_zero(cpu.realtime_period()));
        cpu.set_shares(shares).set_quota(quota).set_period(period).set_cpus(cpus).set_mems(mems);
        cpu.set_realtime_runtime(runtime).set_realtime_period(rt_period);
    }
    if let Some(memory) = resources.memory_mut() {
        let (limit, reservation) = (not_zero(memory.limit()), not_zero(memory.reservation()));
        memory.set_limit(limit).set_reservation(reservation);
    }
    if resources.pids().as_ref().is_some_and(|pids| pids.limit() == 0) {
        resources.set_pids(None);
    }
    if let Some(block_io) = resources.block_io_mut() {
        let weight = not_zero(block_io.weight());
        block_io.set_weight(weight);
    }
}

fn not_zero<T: PartialEq + Default>(value: Option<T>) -> Option<T> {
    value.filter(|value| *value != T::default())
}

/// The limits as they hold in a guest of this size.
fn inside(resources: &LinuxResources, size: Size) -> Result<LinuxResources> {
    let mut inside = resources.clone();
    if let Some(limit) = inside.memory().as_ref().and_then(LinuxMemory::limit)
        && u64::try_from(limit).is_ok_and(|limit| limit > size.memory)
    {
        return Err(Error::TooLarge { limit, memory: size.memory });
    }
    if let Some(cpu) = inside.cpu_mut() {
        refuse_real_time(cpu)?;
        let cpus = cpu.cpus().as_deref().map(|cpus| size.cpus_for(cpus)).transpose();
        let cpus = cpus.map_err(|list| Error::Usage(format!("\"{list}\" is no list of processors such as 0-2,7")))?;
        cpu.set_cpus(cpus).set_mems(None);
    }
    Ok(inside)
}

fn refuse_real_time(cpu: &LinuxCpu) -> Result<()> {
    match (cpu.realtime_runtime(), cpu.realtime_period()) {
        (None, None) => Ok(()),
        _ => Err(Error::Usage("a guest's cgroups, which are of version 2, have no real-time limits".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size { vcpus: 2, memory: 256 << 20 };

    fn prepared(text: &str) -> LinuxResources {
        let mut resources = serde_json::from_str(text).unwrap();
        leave_out_what_stays(&mut resources);
        resources
    }

    #[test]
    fn what_is_zero_stays() {
        let resources = prepared(
            r#"{"cpu":{"shares":0,"quota":0,"period":0,"cpus":"","mems":"","realtimeRuntime":0},"pids":{"limit":0},
                "memory":{"limit":0,"reservation":0},"blockIO":{"weight":0},"devices":[{"allow":false}]}"#,
        );
        let changes = serde_json::to_value(inside(&resources, SIZE).unwrap()).unwrap();
        assert_eq!(changes, serde_json::json!({"cpu": {}, "memory": {}, "blockIO": {}}));
    }

    #[test]
    fn a_guest_has_its_own_processors_and_memory() {
        let inside = |text: &str| inside(&prepared(text), SIZE);
        let cpus = |text: &str| inside(text).unwrap().cpu().as_ref().unwrap().cpus().clone();
        assert_eq!(cpus(r#"{"cpu":{"cpus":"7","mems":"1"}}"#).as_deref(), Some("0"));
        assert_eq!(cpus(r#"{"cpu":{"cpus":"3-9"}}"#).as_deref(), Some("0-1"));
        assert_eq!(cpus(r#"{"cpu":{"shares":5}}"#), None);
        assert!(inside(r#"{"cpu":{"cpus":"x"}}"#).unwrap_err().to_string().contains("\"x\""));
        assert!(inside(r#"{"cpu":{"realtimePeriod":1000}}"#).unwrap_err().to_string().contains("real-time"));
        assert!(inside(r#"{"memory":{"limit":268435456}}"#).is_ok());
        assert!(inside(r#"{"memory":{"limit":-1}}"#).is_ok());
        let error = inside(r#"{"memory":{"limit":268435457}}"#).unwrap_err().to_string();
        assert!(error.contains("256 MiB"), "{error}");
    }
}
