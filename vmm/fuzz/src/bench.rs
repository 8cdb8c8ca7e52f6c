//! A device on the bench: between a guest and a host that do as the input says, in one thread.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use runvm_vmm::Event;
use runvm_vmm::virtio::driver::serve;
use runvm_vmm::virtio::{Device, Interrupt, Io};
use virtio_queue::QueueState;

use crate::guest::{Guest, Piece, io};

/// How often a device has its turn before the guest goes on. One that never rests is no bug: a guest can keep it busy.
const TURNS: usize = 24;

/// A kind of device, and the host's end of it.
pub trait Subject: Sized {
    /// The device.
    type Device: Device;

    /// The host's side, before there is a device.
    fn new(u: &mut Unstructured<'_>) -> Result<Self>;

    /// A device of this make. Those before it are gone.
    fn device(&mut self) -> Self::Device;

    /// What starts it.
    fn start(device: &mut Self::Device, io: &mut Io) -> bool {
        device.start(io).is_ok()
    }

    /// A request for a queue, sound or not.
    fn request(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<Vec<Piece>>;

    /// Something happens on the host.
    fn event(&mut self, u: &mut Unstructured<'_>, device: &mut Self::Device) -> Result<()> {
        let _ = (u, device);
        Ok(())
    }

    /// A sequence of requests and events that leads where single ones seldom get. The device has its turn after each.
    fn sequence(bench: &mut Bench<Self>, u: &mut Unstructured<'_>) -> Result<()> {
        let queue = bench.queue(u)?;
        for _ in 0..u.int_in_range(2..=8)? {
            bench.request(u, queue)?;
        }
        Ok(())
    }
}

/// The bench.
pub struct Bench<S: Subject> {
    device: S::Device,
    io: Io,
    /// Whether a driver has started the device, and it has not failed.
    serving: bool,
    interrupt: Interrupt,
    subject: S,
    // Its memory is the last to go.
    guest: Guest,
}

/// Does what the input says, until it says nothing more.
pub fn run<S: Subject>(data: &[u8]) {
    // All errors are the end of the input.
    let _ = play::<S>(&mut Unstructured::new(data));
}

fn play<S: Subject>(u: &mut Unstructured<'_>) -> Result<()> {
    let mut bench = Bench::<S>::new(u)?;
    while !u.is_empty() {
        bench.step(u)?;
    }
    Ok(())
}

impl<S: Subject> Bench<S> {
    #[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no descriptors")]
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let mut subject = S::new(u)?;
        let device = subject.device();
        let guest = Guest::new();
        let interrupt = Interrupt::new(Arc::new(Event::new().expect("an event")));
        let io = io(guest.memory(), &interrupt, &[], 0);
        let mut bench = Self { device, io, serving: false, interrupt, subject, guest };
        bench.set_up(u)?;
        Ok(bench)
    }

    /// The guest's driver begins.
    fn set_up(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let states = self.guest.set_up(u, &self.device)?;
        let offered = self.device.features();
        let features = if u.ratio(1, 4)? { offered & u.arbitrary::<u64>()? } else { offered };
        self.begin(&states, features);
        Ok(())
    }

    fn begin(&mut self, states: &[QueueState], features: u64) {
        self.io = io(self.guest.memory(), &self.interrupt, states, features);
        self.serving = S::start(&mut self.device, &mut self.io);
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=15)? {
            0..=4 => {
                let queue = self.queue(u)?;
                self.request(u, queue)?;
            }
            5 | 6 => {
                let queue = self.queue(u)?;
                self.put(u, queue)?;
            }
            7 | 8 => self.event(u)?,
            9 | 10 => S::sequence(self, u)?,
            11 => self.guest.scribble(u)?,
            12 => {
                let queue = self.queue(u)?;
                self.guest.disorder(u, queue)?;
                self.kick(queue);
            }
            13 => self.serve(),
            14 => self.pause(u)?,
            _ => {
                self.device.reset();
                self.set_up(u)?;
            }
        }
        Ok(())
    }

    /// One of the queues.
    pub fn queue(&self, u: &mut Unstructured<'_>) -> Result<usize> {
        u.choose_index(self.guest.queues())
    }

    /// Puts a request, and has it served.
    pub fn request(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<()> {
        self.put(u, queue)?;
        self.serve();
        Ok(())
    }

    /// Puts a request and lets it lie.
    pub fn put(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<()> {
        let pieces = self.subject.request(u, queue)?;
        self.guest.put(u, queue, &pieces)?;
        self.kick(queue);
        Ok(())
    }

    /// Puts these pieces, and has them served.
    pub fn request_of(&mut self, u: &mut Unstructured<'_>, queue: usize, pieces: &[Piece]) -> Result<()> {
        self.guest.put(u, queue, pieces)?;
        self.kick(queue);
        self.serve();
        Ok(())
    }

    /// Lets something happen on the host, and the device see it.
    pub fn event(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        self.subject.event(u, &mut self.device)?;
        self.serve();
        Ok(())
    }

    /// The host's side.
    pub fn subject(&mut self) -> &mut S {
        &mut self.subject
    }

    fn kick(&mut self, queue: usize) {
        if let Some(attendant) = self.device.attendant() {
            if attendant.attend(queue).is_err() {
                self.serving = false;
            }
        } else if let Some(queue) = self.io.queues.get(queue) {
            queue.kick();
        }
    }

    /// Gives the device its turns.
    pub fn serve(&mut self) {
        for _ in 0..TURNS {
            if !self.serving {
                return;
            }
            match serve(&mut self.device, &mut self.io) {
                Ok(true) => {}
                Ok(false) => return,
                // It waits for a reset, or for a pause: what starts it again.
                Err(_) => self.serving = false,
            }
        }
    }

    /// Lets the device rest, and go on: itself or another in its place, which is told what it was or something else.
    fn pause(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let features = self.io.features;
        if self.device.rest(&mut self.io).is_err() {
            self.serving = false;
        }
        let states: Vec<_> = self.io.queues.drain(..).map(|queue| queue.into_queue().state()).collect();
        if let Ok(mut saved) = self.device.save()
            && u.ratio(2, 3)?
        {
            if u.ratio(1, 2)? {
                mutate(u, &mut saved)?;
            }
            self.device = self.subject.device();
            if self.device.restore(&saved).is_err() {
                self.device.reset();
            }
        }
        self.begin(&states, features);
        self.serve();
        Ok(())
    }
}

/// Changes some bytes.
pub fn mutate(u: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    for _ in 0..u.int_in_range(0..=4)? {
        let place = u.int_in_range(0..=bytes.len())?;
        match u.int_in_range(0..=3)? {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, u.arbitrary()?),
            2 if place < bytes.len() => drop(bytes.remove(place)),
            _ => {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte = u.arbitrary()?;
                }
            }
        }
    }
    Ok(())
}
