//! What makes up a processor, and the rest of a machine that KVM holds, at rest: to be written to a file and read back.

use kvm_bindings::{
    CpuId, KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave,
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::machine::Flavour;

/// What KVM's own structure for the vector state holds.
const XSAVE_SIZE: usize = 4096;
/// When it fires depends on the clock, which has to be there first.
const TSC_DEADLINE: u32 = 0x6e0;
/// Where a PVM guest's processor has the page that it shares with its host. KVM keeps it, and does not list it.
const PVM_SHARED_PAGE: u32 = 0x4b56_4d10;

/// State that KVM did not give or take.
#[derive(Debug, Error)]
#[error("KVM does not {action} the {what}")]
pub struct StateError {
    action: &'static str,
    what: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

/// A processor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What it says of itself.
    pub cpuid: CpuId,
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    special: kvm_sregs,
    vectors: Xsave,
    /// None where KVM hides the processor's.
    extended_control: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// The rest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    clock: kvm_clock_data,
    irqchips: Vec<kvm_irqchip>,
}

/// Reads a processor that does not run.
pub fn save_vcpu(vm: &VmFd, vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, StateError> {
    let get = |what| move |source| StateError { action: "give", what, source };
    Ok(VcpuState {
        // The MP state is first: reading it lets what the local APIC has pending take effect.
        mp_state: vcpu.get_mp_state().map_err(get("processor's running state"))?,
        cpuid: vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(get("processor's description"))?,
        registers: vcpu.get_regs().map_err(get("registers"))?,
        special: vcpu.get_sregs().map_err(get("special registers"))?,
        vectors: get_vectors(vm, vcpu).map_err(get("vector registers"))?,
        extended_control: vm
            .check_extension(Cap::Xcrs)
            .then(|| vcpu.get_xcrs())
            .transpose()
            .map_err(get("extended control registers"))?,
        debug: vcpu.get_debug_regs().map_err(get("debug registers"))?,
        lapic: vcpu.get_lapic().map_err(get("local APIC"))?,
        msrs: get_msrs(vcpu, msrs).map_err(get("model specific registers"))?,
        events: vcpu.get_vcpu_events().map_err(get("pending events"))?,
    })
}

/// Writes a processor that has not run.
pub fn restore_vcpu(vm: &VmFd, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), StateError> {
    let set = |what| move |source| StateError { action: "take", what, source };
    vcpu.set_cpuid2(&state.cpuid).map_err(set("processor's description"))?;
    vcpu.set_mp_state(state.mp_state).map_err(set("processor's running state"))?;
    vcpu.set_regs(&state.registers).map_err(set("registers"))?;
    vcpu.set_sregs(&state.special).map_err(set("special registers"))?;
    set_vectors(vm, vcpu, &state.vectors).map_err(set("vector registers"))?;
    if let Some(extended_control) = &state.extended_control {
        vcpu.set_xcrs(extended_control).map_err(set("extended control registers"))?;
    }
    vcpu.set_debug_regs(&state.debug).map_err(set("debug registers"))?;
    vcpu.set_lapic(&state.lapic).map_err(set("local APIC"))?;
    let (late, early): (Vec<_>, Vec<_>) = state.msrs.iter().copied().partition(|entry| entry.index == TSC_DEADLINE);
    set_msrs(vcpu, &early).map_err(set("model specific registers"))?;
    set_msrs(vcpu, &late).map_err(set("timer"))?;
    vcpu.set_vcpu_events(&state.events).map_err(set("pending events"))
}

/// Reads what the machine has once.
pub fn save_vm(vm: &VmFd) -> Result<VmState, StateError> {
    let get = |what| move |source| StateError { action: "give", what, source };
    let mut irqchips = Vec::new();
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(get("interrupt controller"))?;
        irqchips.push(chip);
    }
    let mut clock = vm.get_clock().map_err(get("clock"))?;
    // The flags are what KVM tells, not what it takes.
    clock.flags &= !KVM_CLOCK_TSC_STABLE;
    Ok(VmState { clock, irqchips })
}

/// Writes what the machine has once.
pub fn restore_vm(vm: &VmFd, state: &VmState) -> Result<(), StateError> {
    let set = |what| move |source| StateError { action: "take", what, source };
    for chip in &state.irqchips {
        vm.set_irqchip(chip).map_err(set("interrupt controller"))?;
    }
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(set("clock"))
}

/// The model specific registers that have to be saved.
pub fn msrs_to_save(kvm: &Kvm, flavour: Flavour) -> Result<Vec<u32>, StateError> {
    let get = |source| StateError { action: "give", what: "list of model specific registers", source };
    let mut list = kvm.get_msr_index_list().map_err(get)?.as_slice().to_vec();
    if flavour == Flavour::Pvm {
        list.push(PVM_SHARED_PAGE);
    }
    Ok(list)
}

/// The size of the vector state, in bytes, where it is more than KVM's own structure holds.
fn large_vectors(vm: &VmFd) -> Option<usize> {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).ok().filter(|&size| size > XSAVE_SIZE)
}

fn get_vectors(vm: &VmFd, vcpu: &VcpuFd) -> Result<Xsave, kvm_ioctls::Error> {
    let extra = large_vectors(vm).map_or(0, |size| (size - XSAVE_SIZE).div_ceil(4));
    let mut vectors = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    if extra > 0 {
        // SAFETY: there is room for all that KVM_CAP_XSAVE2 says, and no feature is enabled for the process afterwards.
        unsafe { vcpu.get_xsave2(&mut vectors)? };
        return Ok(vectors);
    }
    let small = vcpu.get_xsave()?;
    // SAFETY: the length of the trailing array does not change.
    let inner = unsafe { vectors.as_mut_fam_struct() };
    inner.xsave = small;
    Ok(vectors)
}

fn set_vectors(vm: &VmFd, vcpu: &VcpuFd, vectors: &Xsave) -> Result<(), kvm_ioctls::Error> {
    let Some(size) = large_vectors(vm) else {
        // SAFETY: this KVM reads no more than the structure has.
        return unsafe { vcpu.set_xsave(&vectors.as_fam_struct_ref().xsave) };
    };
    if XSAVE_SIZE + vectors.as_slice().len() * 4 < size {
        return Err(kvm_ioctls::Error::new(libc::EINVAL));
    }
    // SAFETY: it is at least as large as what this KVM reads.
    unsafe { vcpu.set_xsave2(vectors) }
}

fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let wanted: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let mut batch = Msrs::from_entries(rest).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        let read = vcpu.get_msrs(&mut batch)?;
        found.extend_from_slice(&batch.as_slice()[..read]);
        // KVM stops at one that is listed and that this processor does not have.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), kvm_ioctls::Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = Msrs::from_entries(rest).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        let written = vcpu.set_msrs(&batch)?;
        if let Some(refused) = rest.get(written) {
            // Some can be read and not be written: those that say what the processor is.
            tracing::debug!("model specific register {:#x} is not restored", refused.index);
        }
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}
