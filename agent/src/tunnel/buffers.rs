//! Buffers that are borrowed only while bytes move.
//!
//! A flow that waits holds none; one that moves bytes takes a buffer of the size that its
//! traffic deserves and gives it back when it is empty. Each thread keeps some of what was
//! given back, already written once, so that taking one costs neither an allocation nor zeroing.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

/// Sizes, bytes. What a handshake or a small request needs; what bulk deserves.
const SIZES: [usize; 4] = [4 << 10, 16 << 10, 64 << 10, LARGEST];
/// How many of each size a thread keeps: 768 KiB at most.
const KEPT: [usize; 4] = [16, 4, 2, 2];

/// The smallest buffer, bytes.
pub const SMALLEST: usize = SIZES[0];
/// The largest buffer, bytes.
pub const LARGEST: usize = 256 << 10;

thread_local! {
    static FREE: RefCell<[Vec<Box<[u8]>>; 4]> = const { RefCell::new([const { Vec::new() }; 4]) };
}

/// A borrowed buffer. What it holds at first is whatever was last written to it: only what its
/// holder has filled may be read.
#[derive(Debug)]
pub struct Buffer {
    bytes: Box<[u8]>,
}

impl Buffer {
    /// A buffer of at least `size` bytes, or of the largest size.
    pub fn take(size: usize) -> Self {
        let class = SIZES.iter().position(|&s| s >= size).unwrap_or(SIZES.len() - 1);
        let kept = FREE.try_with(|free| free.borrow_mut()[class].pop()).ok().flatten();
        Self { bytes: kept.unwrap_or_else(|| vec![0; SIZES[class]].into_boxed_slice()) }
    }

    /// How many buffers of all sizes this thread keeps.
    #[cfg(test)]
    fn kept() -> usize {
        FREE.with(|free| free.borrow().iter().map(Vec::len).sum())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let Some(class) = SIZES.iter().position(|&s| s == bytes.len()) else { return };
        // A thread that ends keeps nothing.
        let _ = FREE.try_with(|free| {
            let free = &mut free.borrow_mut()[class];
            if free.len() < KEPT[class] {
                free.push(bytes);
            }
        });
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// The size that the next batch deserves after one of `read` bytes into `size`: four times as
/// much when it was filled, half when a quarter would have done.
pub fn next_size(size: usize, read: usize) -> usize {
    if read >= size {
        (size * 4).min(LARGEST)
    } else if read < size / 4 {
        (size / 2).max(SMALLEST)
    } else {
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_of_the_next_size_and_come_back() {
        std::thread::spawn(|| {
            assert_eq!(Buffer::take(1).len(), SMALLEST);
            assert_eq!(Buffer::take(SMALLEST + 1).len(), 16 << 10);
            assert_eq!(Buffer::take(10 * LARGEST).len(), LARGEST);
            assert_eq!(Buffer::kept(), 3);
            let mut first = Buffer::take(SMALLEST);
            first[0] = 7;
            drop(first);
            let again = Buffer::take(SMALLEST);
            assert_eq!((again[0], Buffer::kept()), (7, 2), "the same one");
            drop(again);
            let many: Vec<Buffer> = (0..100).map(|_| Buffer::take(LARGEST)).collect();
            drop(many);
            assert_eq!(Buffer::kept(), 2 + KEPT[3], "what is kept is bounded");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn batches_grow_with_what_fills_them() {
        assert_eq!(next_size(SMALLEST, SMALLEST), 4 * SMALLEST);
        assert_eq!(next_size(LARGEST, LARGEST), LARGEST);
        assert_eq!(next_size(LARGEST, 10), LARGEST / 2);
        assert_eq!(next_size(SMALLEST, 10), SMALLEST);
        assert_eq!(next_size(16 << 10, 8 << 10), 16 << 10);
    }
}
