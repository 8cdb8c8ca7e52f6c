//! The threads that run the guest's processors.

use std::cell::Cell;
use std::io;
use std::mem;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use super::bus::Bus;
use super::{End, Ends};
use crate::confinement::{Confinement, Role};

/// The keyboard controller's port, and the byte that resets the machine.
const RESET: (u16, u8) = (0x64, 0xfe);

thread_local! {
    /// The flag in this thread's `kvm_run` that makes KVM return at once.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A thread that is ending has nothing to leave any more.
    let _ = IMMEDIATE_EXIT.try_with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the flag lies in the `kvm_run` page of the processor that this thread runs, which is mapped as long
            // as the pointer is there: the thread itself sets and clears both.
            unsafe { ptr::write_volatile(flag, 1) };
        }
    });
}

/// Has system calls that a signal comes in between of go on after it, lest a file of the guest's be read in vain because
/// its machine was paused. `KVM_RUN` ends all the same.
fn restart_after(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: a `sigaction` may be all zeroes.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: it is written to before the call ends.
    if unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) } != 0 {
        return Err(io::Error::last_os_error());
    }
    action.sa_flags |= libc::SA_RESTART;
    // SAFETY: it is read before the call ends, and is what there was but for a flag.
    match unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What all processors do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Paused,
    Running,
    /// The machine has ended: what would let it run changes nothing.
    Ended,
    Over,
}

#[derive(Debug)]
struct Gate {
    state: Mutex<(Phase, usize)>,
    changed: Condvar,
}

impl Gate {
    /// Waits until processors run; false when they never will again.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        state.1 += 1;
        self.changed.notify_all();
        while matches!(state.0, Phase::Paused | Phase::Ended) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.1 -= 1;
        state.0 == Phase::Running
    }

    fn set(&self, phase: Phase) {
        let mut state = self.lock();
        if state.0 != Phase::Ended || phase == Phase::Over {
            state.0 = phase;
        }
        drop(state);
        self.changed.notify_all();
    }

    fn await_parked(&self, count: usize) {
        let mut state = self.lock();
        while state.1 < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, (Phase, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The processors of a machine: paused at first.
pub struct Vcpus {
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
}

impl Vcpus {
    /// Starts the threads, which wait. The first end of a processor is sent to `ends`.
    pub fn spawn(vcpus: Vec<VcpuFd>, bus: Arc<Bus>, confinement: &Confinement, ends: &Ends) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)?;
        restart_after(SIGRTMIN())?;
        let gate = Arc::new(Gate { state: Mutex::new((Phase::Paused, 0)), changed: Condvar::new() });
        let mut all = Self { vcpus: Vec::new(), threads: Vec::new(), gate };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let vcpu = Arc::new(Mutex::new(vcpu));
            let (confinement, ends) = (confinement.clone(), ends.clone());
            let (ours, bus, gate) = (vcpu.clone(), bus.clone(), all.gate.clone());
            let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                let ready = bus.enter().map_err(io::Error::other).and_then(|()| confinement(Role::Vcpu));
                if let Err(error) = ready {
                    // There is no machine without its processors.
                    ends.send(End::Failed(format!("a processor's thread cannot be confined: {error}")));
                    gate.pass();
                    return;
                }
                attend(&ours, &bus, &gate, &ends);
            })?;
            all.vcpus.push(vcpu);
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Lets them run.
    pub fn resume(&self) {
        self.gate.set(Phase::Running);
    }

    /// Stops them; when this returns none runs, and what they had asked of devices is done.
    pub fn pause(&self) {
        self.gate.set(Phase::Paused);
        self.kick();
        self.gate.await_parked(self.threads.len());
    }

    /// The processors, which must be paused.
    pub fn paused(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus.iter().map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    fn kick(&self) {
        for thread in &self.threads {
            // One that has ended needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.set(Phase::Over);
        self.kick();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn attend(vcpu: &Mutex<VcpuFd>, bus: &Bus, gate: &Gate, ends: &Ends) {
    let flag = &raw mut vcpu.lock().unwrap_or_else(PoisonError::into_inner).get_kvm_run().immediate_exit;
    IMMEDIATE_EXIT.set(flag);
    while gate.pass() {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = run(&mut vcpu, bus, gate) {
            drop(vcpu);
            gate.set(Phase::Ended);
            ends.send(end);
        }
    }
    IMMEDIATE_EXIT.set(ptr::null_mut());
}

/// Runs a processor until it is to pause, or the machine has ended.
fn run(vcpu: &mut VcpuFd, bus: &Bus, gate: &Gate) -> Option<End> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => bus.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) if (port, data) == (RESET.0, &[RESET.1]) => return Some(End::Shutdown),
            Ok(VcpuExit::IoOut(port, data)) => bus.write_port(port, data),
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Some(End::Shutdown),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Some(End::Failed(format!("the processor does not enter the guest (reason {reason:#x})")));
            }
            Ok(VcpuExit::InternalError) => {
                return Some(End::Failed("KVM cannot execute what the guest's processor is to do".to_owned()));
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
            Ok(other) => return Some(End::Failed(format!("the guest's processor stopped: {other:?}"))),
            // Between two runs, so that what KVM still has to finish of the last exit is finished.
            Err(error) if error.errno() == libc::EINTR => {
                vcpu.set_kvm_immediate_exit(0);
                if gate.lock().0 != Phase::Running {
                    return None;
                }
            }
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => return Some(End::Failed(format!("KVM does not run the guest: {error}"))),
        }
    }
}
