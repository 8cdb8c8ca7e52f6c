//! The balloon. Its memory is private and anonymous, as that of a machine that was not restored.

use arbitrary::{Result, Unstructured};
use runvm_vmm::virtio::Device as _;
use runvm_vmm::virtio::balloon::{Backing, Balloon, Control};

use crate::bench::{self, Subject};
use crate::guest::{Piece, length, raw};

const REPORTING: usize = 2;

/// Does what the input says.
pub fn run(data: &[u8]) {
    bench::run::<Host>(data);
}

struct Host {
    backing: Backing,
    control: Option<Control>,
}

impl Subject for Host {
    type Device = Balloon;

    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let backing = if u.arbitrary()? { Backing::Private } else { Backing::Shared };
        Ok(Self { backing, control: None })
    }

    fn device(&mut self) -> Balloon {
        let balloon = Balloon::new(self.backing);
        self.control = Some(balloon.control());
        balloon
    }

    fn request(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<Vec<Piece>> {
        if u.ratio(1, 8)? {
            return raw(u);
        }
        let count = u.int_in_range(1..=40)?;
        if queue == REPORTING {
            return (0..count).map(|_| length(u).map(Piece::Writable)).collect();
        }
        let mut numbers = Vec::new();
        let mut page: u32 = *u.choose(&[0, 255, 256, 510, 511, 512, 1 << 20, u32::MAX - 4])?;
        for _ in 0..count {
            numbers.extend(page.to_le_bytes());
            page = page.wrapping_add_signed(u.int_in_range(-1..=3)?);
        }
        // More than a request may have.
        let copies = *u.choose(&[1, 1, 1, 30])?;
        Ok(vec![Piece::Readable(numbers.repeat(copies))])
    }

    fn event(&mut self, u: &mut Unstructured<'_>, device: &mut Balloon) -> Result<()> {
        if let Some(control) = &self.control {
            control.set_target(u.arbitrary()?);
            let _ = (control.target(), control.actual());
        }
        let bytes: [u8; 8] = u.arbitrary()?;
        let length = u.int_in_range(0..=8)?;
        device.config().write(u.int_in_range(0..=9)?, &bytes[..length]);
        Ok(())
    }
}
