//! The entropy source.

use arbitrary::{Result, Unstructured};
use runvm_vmm::virtio::rng::Rng;

use crate::bench::{self, Subject};
use crate::guest::{Piece, length, raw};

/// Does what the input says.
pub fn run(data: &[u8]) {
    bench::run::<Entropy>(data);
}

struct Entropy;

impl Subject for Entropy {
    type Device = Rng;

    fn new(_: &mut Unstructured<'_>) -> Result<Self> {
        Ok(Self)
    }

    fn device(&mut self) -> Rng {
        Rng
    }

    fn request(&mut self, u: &mut Unstructured<'_>, _: usize) -> Result<Vec<Piece>> {
        if u.ratio(1, 2)? { raw(u) } else { Ok(vec![Piece::Writable(length(u)?)]) }
    }
}
