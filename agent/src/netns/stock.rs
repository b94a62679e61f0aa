//! Sockets made in advance in a namespace, so that a flow need not wait for the thread that
//! enters it. A namespace from which nobody has dialled for some seconds holds none.

use std::{
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Sockets that a namespace's shelf of one family holds at most: 2 KiB of kernel memory each.
const MOST: usize = 32;
/// What it holds when flows are rare.
const LEAST: usize = 8;

/// Unconnected TCP sockets of one namespace, of both families.
#[derive(Debug, Default)]
pub(super) struct Stock {
    ipv4: Mutex<Shelf>,
    ipv6: Mutex<Shelf>,
}

#[derive(Debug, Default)]
struct Shelf {
    sockets: Vec<OwnedFd>,
    /// How many it should hold; none until a first one was asked for.
    target: usize,
    /// Somebody was asked to fill it.
    asked: bool,
    /// A socket was asked for since the last look.
    used: bool,
}

/// What is to be done after a socket was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    /// Nothing.
    Enough,
    /// The shelf is to be filled; nobody else was asked.
    Wanted,
}

impl Stock {
    /// A socket, when there is one. A shelf that was found empty is to be larger.
    pub(super) fn take(&self, ipv6: bool) -> (Option<OwnedFd>, Fill) {
        let mut shelf = self.shelf(ipv6);
        let socket = shelf.sockets.pop();
        shelf.used = true;
        if socket.is_none() {
            shelf.target = (shelf.target * 2).clamp(LEAST, MOST);
        }
        let fill = if shelf.asked || shelf.sockets.len() * 2 > shelf.target {
            Fill::Enough
        } else {
            shelf.asked = true;
            Fill::Wanted
        };
        (socket, fill)
    }

    /// How many sockets are wanted, asked by whoever is about to make them.
    pub(super) fn wanted(&self, ipv6: bool) -> usize {
        let shelf = self.shelf(ipv6);
        shelf.target.saturating_sub(shelf.sockets.len())
    }

    /// Takes what was made; the next one who finds too few may ask again. One that brings less
    /// than was wanted met an error: whoever finds the shelf empty meets it too, and is told.
    pub(super) fn fill(&self, ipv6: bool, made: Vec<OwnedFd>) {
        let mut shelf = self.shelf(ipv6);
        shelf.asked = false;
        let room = MOST.saturating_sub(shelf.sockets.len());
        shelf.sockets.extend(made.into_iter().take(room));
    }

    /// Empties the shelves that nobody has used since the last look; false when both are empty.
    pub(super) fn tidy(&self) -> bool {
        [false, true].map(|ipv6| {
            let mut shelf = self.shelf(ipv6);
            if !std::mem::take(&mut shelf.used) && !shelf.asked {
                shelf.sockets = Vec::new();
                shelf.target = 0;
            }
            shelf.target > 0
        }) != [false, false]
    }

    fn shelf(&self, ipv6: bool) -> MutexGuard<'_, Shelf> {
        let shelf = if ipv6 { &self.ipv6 } else { &self.ipv4 };
        // Nothing panics under the lock.
        shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn made(n: usize) -> Vec<OwnedFd> {
        (0..n).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn a_shelf_grows_when_it_is_found_empty_and_is_filled_once() {
        let stock = Stock::default();
        assert_eq!(stock.wanted(false), 0, "nobody has asked for any");
        let (none, fill) = stock.take(false);
        assert!(none.is_none() && fill == Fill::Wanted);
        assert_eq!(stock.take(false).1, Fill::Enough, "it is being filled");
        assert_eq!(stock.wanted(false), 2 * LEAST, "twice found empty");
        stock.fill(false, made(2 * LEAST));
        for _ in 1..LEAST {
            assert!(matches!(stock.take(false), (Some(_), Fill::Enough)));
        }
        assert!(matches!(stock.take(false), (Some(_), Fill::Wanted)), "half is left");
        assert_eq!(stock.wanted(false), LEAST);
        assert_eq!(stock.wanted(true), 0, "families have shelves of their own");
    }

    #[test]
    fn a_shelf_is_bounded() {
        let stock = Stock::default();
        for _ in 0..20 {
            let (none, _) = stock.take(true);
            assert!(none.is_none());
        }
        assert_eq!(stock.wanted(true), MOST);
        stock.fill(true, made(2 * MOST));
        assert_eq!(stock.wanted(true), 0);
        let held = (0..).take_while(|_| stock.take(true).0.is_some()).count();
        assert_eq!(held, MOST);
    }

    #[test]
    fn a_shelf_that_nobody_uses_is_emptied() {
        let stock = Stock::default();
        assert!(!stock.tidy());
        let _ = stock.take(false);
        stock.fill(false, made(LEAST));
        assert!(stock.tidy(), "it was used a moment ago");
        assert!(stock.take(false).0.is_some());
        assert!(stock.tidy());
        assert!(!stock.tidy(), "nobody has used it since");
        assert!(stock.take(false).0.is_none());
    }

    #[test]
    fn a_fill_that_failed_may_be_asked_for_again() {
        let stock = Stock::default();
        assert_eq!(stock.take(false).1, Fill::Wanted);
        stock.fill(false, Vec::new());
        assert_eq!(stock.take(false).1, Fill::Wanted);
    }
}
