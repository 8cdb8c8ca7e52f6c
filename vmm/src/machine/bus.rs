//! Where a guest's accesses go that no memory answers: the registers of devices, and in debugging a serial port.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use crate::Event;
use crate::virtio::transport::{QUEUE_NOTIFY, SIZE, Transport};
use crate::virtio::{Attendant, DeviceError, Line};

/// Where the first device's registers are; the next follow.
pub const DEVICES: u64 = 0xd000_0000;
/// The first device's interrupt. Those below are a PC's own.
pub const FIRST_INTERRUPT: u32 = 5;
/// The interrupt controller has 24 pins.
pub const MAX_DEVICES: usize = 19;
/// The first serial port: its registers, and its interrupt.
const SERIAL: u16 = 0x3f8;
const SERIAL_REGISTERS: u16 = 8;
/// The serial port's interrupt.
pub const SERIAL_INTERRUPT: u32 = 4;

/// A pin of the guest's interrupt controller, of which each edge is an interrupt.
///
/// The device's thread raises it itself. An irqfd would have a worker of the host's kernel do it, which has to get its
/// turn on a processor first, and an interrupt that is on its way to the worker is in nobody's saved state.
#[derive(Debug)]
pub struct Pin {
    /// Whose.
    pub vm: Arc<VmFd>,
    /// Which.
    pub number: u32,
}

impl Line for Pin {
    fn raise(&self) {
        // It stays high until the next time. As the guest may run in this thread's place as soon as it is high, nothing
        // must be left to do then; and where two threads do this at once there is an edge after the later one's reason.
        for level in [false, true] {
            // It fails only where there is no such pin.
            let _ = self.vm.set_irq_line(self.number, level);
        }
    }
}

/// A serial port that writes to a file.
pub type Console = Serial<ConsoleLine, NoEvents, File>;

/// The console's interrupt line.
#[derive(Debug)]
pub struct ConsoleLine(pub Event);

impl Trigger for ConsoleLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise();
        Ok(())
    }
}

/// All that has registers.
pub struct Bus {
    devices: Vec<Place>,
    console: Option<Mutex<Console>>,
}

/// Where a device is on the bus.
struct Place {
    device: Mutex<Transport>,
    attendant: Option<Arc<dyn Attendant>>,
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Transport> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus {
    /// A bus with these devices, in the order of their addresses.
    pub fn new(devices: Vec<Transport>, console: Option<Console>) -> Self {
        let place = |device: Transport| Place { attendant: device.attendant(), device: Mutex::new(device) };
        Self { devices: devices.into_iter().map(place).collect(), console: console.map(Mutex::new) }
    }

    /// Prepares the calling thread for reads and writes; to be called before it is confined.
    pub fn enter(&self) -> Result<(), DeviceError> {
        self.devices.iter().filter_map(|place| place.attendant.as_ref()).try_for_each(|attendant| attendant.enter())
    }

    /// The devices, in the order of their addresses.
    pub fn devices(&self) -> impl Iterator<Item = MutexGuard<'_, Transport>> {
        self.devices.iter().map(Place::lock)
    }

    /// The guest reads; what nothing answers is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((place, offset)) = self.device(address) {
            place.lock().read(offset, data);
        }
    }

    /// The guest writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        let Some((place, offset)) = self.device(address) else { return };
        match (&place.attendant, <[u8; 4]>::try_from(data)) {
            (Some(attendant), Ok(queue)) if offset == QUEUE_NOTIFY => {
                if let Err(error) = attendant.attend(u32::from_le_bytes(queue) as usize) {
                    place.lock().fail(&error);
                }
            }
            _ => place.lock().write(offset, data),
        }
    }

    /// The guest reads a port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Some((console, register))) = (data, self.console(port)) {
            *byte = console.lock().unwrap_or_else(PoisonError::into_inner).read(register);
        }
    }

    /// The guest writes to a port.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        if let (&[byte], Some((console, register))) = (data, self.console(port)) {
            // A full disk loses the console, not the guest.
            let _ = console.lock().unwrap_or_else(PoisonError::into_inner).write(register, byte);
        }
    }

    fn device(&self, address: u64) -> Option<(&Place, u64)> {
        let offset = address.checked_sub(DEVICES)?;
        let device = self.devices.get(usize::try_from(offset / SIZE).ok()?)?;
        Some((device, offset % SIZE))
    }

    fn console(&self, port: u16) -> Option<(&Mutex<Console>, u8)> {
        let register = port.checked_sub(SERIAL).filter(|&register| register < SERIAL_REGISTERS)?;
        Some((self.console.as_ref()?, register as u8))
    }
}
