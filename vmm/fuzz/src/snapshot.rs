//! Snapshots: the state file, and a device that takes over from what one says.

use arbitrary::{Result, Unstructured};
use runvm_vmm::machine::{saved_devices, state_file};

use crate::board::Board;

/// What any body ends with: fields that the input has no bytes for are zero.
const REST: usize = 1 << 14;

/// Does what the input says.
pub fn run(data: &[u8]) {
    // All errors are the end of the input.
    let _ = play(&mut Unstructured::new(data));
}

fn play(u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=3)? {
        0 => drop(saved_devices(u.bytes(u.len())?)),
        1 => {
            // The kind of KVM, 64 MiB, and one block of them.
            let mut body = vec![u.int_in_range(0..=1)?, 0x80, 0x80, 0x80, 0x20, 1];
            body.extend(u.bytes(u.len())?);
            body.extend([0; REST]);
            drop(saved_devices(&state_file(&body)[..]));
        }
        _ => {
            let mut board = Board::new(u)?;
            board.start(u)?;
            while !u.is_empty() {
                board.disturb(u)?;
                board.move_on(u)?;
            }
        }
    }
    Ok(())
}
