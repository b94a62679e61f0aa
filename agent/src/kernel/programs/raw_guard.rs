//! The raw guard's programs on the node's ends of pods' links: tcx links, pinned like all
//! others, or clsact filters where the kernel has no tcx (before 6.6).
//!
//! Filters are no objects that could be pinned: they stay with their device, are found by
//! their preference and handle, and are replaced by attaching the new one beside the old.

use std::os::fd::AsFd;

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
};

use super::{GUARD_OBJECT, KernelError, LinkTarget, Programs, attach, bpf, pins, program_fd};
use crate::kernel::features::Feature;

/// (program, hook, direction for clsact, prefix of the pins; the interface follows). What
/// arrives is noted before what leaves is judged.
const GUARDS: [(&str, u32, TcAttachType, &str); 2] = [
    ("guard_in", attach::TCX_EGRESS, TcAttachType::Egress, "guard-in-"),
    ("guard_out", attach::TCX_INGRESS, TcAttachType::Ingress, "guard-out-"),
];

/// Preference of our clsact filters; others choose theirs from 49152 downwards.
const PREFERENCE: u16 = 15_008;
/// Our filters' handles: the one that is not in use is taken.
const HANDLES: [u16; 2] = [1, 2];

impl Programs {
    /// Attaches this version's guard to a device of the node, in place of whatever instance
    /// of ours is there.
    ///
    /// # Errors
    /// Names the device.
    pub fn attach_guard(&mut self, interface: u32) -> Result<(), KernelError> {
        if self.guarded.contains(&interface) {
            return Ok(());
        }
        for (name, hook, direction, prefix) in GUARDS {
            if self.features.has(Feature::Tcx) {
                self.attach_tcx(name, hook, &format!("{prefix}{interface}"), interface)?;
            } else {
                self.attach_clsact(name, direction, interface)?;
            }
        }
        self.guarded.insert(interface);
        Ok(())
    }

    fn attach_tcx(
        &mut self,
        name: &'static str,
        hook: u32,
        pin: &str,
        interface: u32,
    ) -> Result<(), KernelError> {
        let program = program_fd(&mut self.guard, GUARD_OBJECT, name)?.try_clone_to_owned();
        let program = program.map_err(|source| attach_error(name, interface, source))?;
        let wanted = |found| found == LinkTarget::Interface(interface);
        if self.replace(pin, wanted, program.as_fd())? {
            return Ok(());
        }
        let link = bpf::link_create_on_interface(program.as_fd(), interface, hook)
            .map_err(|source| attach_error(name, interface, source))?;
        self.pin_link(link.as_fd(), pin)
    }

    fn attach_clsact(
        &mut self,
        name: &'static str,
        direction: TcAttachType,
        interface: u32,
    ) -> Result<(), KernelError> {
        let device = device_name(interface).map_err(|e| attach_error(name, interface, e))?;
        // It may be there already, whoever made it; if it is not, no filter can be attached, and
        // that error tells.
        if let Err(error) = qdisc_add_clsact(&device) {
            tracing::debug!(device, %error, "clsact not added");
        }
        let program = classifier(&mut self.guard, name)?;
        let mut failure = None;
        for handle in HANDLES {
            let options =
                NlOptions { priority: PREFERENCE, handle: TcHandle::new(0, handle), classid: None };
            match program.attach_with_options(&device, direction, TcAttachOptions::Netlink(options))
            {
                Ok(link) => {
                    let link =
                        program.take_link(link).map_err(|source| program_error(name, source))?;
                    // Dropped, it would detach: the filter outlives this process.
                    std::mem::forget(link);
                    for other in HANDLES.into_iter().filter(|other| *other != handle) {
                        // An earlier process's; there may be none.
                        let _ = detach_filter(&device, direction, other);
                    }
                    return Ok(());
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(match failure {
            Some(source) => program_error(name, source),
            None => KernelError::Missing { object: GUARD_OBJECT, name },
        })
    }

    /// Detaches the guard of a pod that is gone or no longer enforced. A device that is gone
    /// is no error.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn detach_guard(&mut self, interface: u32) -> Result<(), KernelError> {
        self.guarded.remove(&interface);
        for (.., prefix) in GUARDS {
            pins::unpin(&self.pins.link(&format!("{prefix}{interface}")))?;
        }
        detach_filters(interface);
        Ok(())
    }

    /// Devices that have a guard: by this process, or pinned by an earlier one.
    pub fn guarded(&self) -> Vec<u32> {
        let (.., prefix) = GUARDS[1];
        let pinned = self.pins.links_with(prefix);
        let mut all: Vec<u32> = pinned.iter().filter_map(|name| name.parse().ok()).collect();
        all.extend(&self.guarded);
        all.sort_unstable();
        all.dedup();
        all
    }

    /// How guards are attached: `tcx` or `clsact`.
    pub fn guard_kind(&self) -> &'static str {
        if self.features.has(Feature::Tcx) { "tcx" } else { "clsact" }
    }
}

/// Removes our clsact filters from a device, as many as there are; the device may be gone.
fn detach_filters(interface: u32) -> usize {
    device_name(interface).map_or(0, |device| detach_from(&device))
}

/// The same for every device of this network namespace: a guard that is attached ahead of time
/// has no row that would name its device.
pub(in crate::kernel) fn detach_all_filters() -> usize {
    // A line for each device, `name: counters`, after two of headings.
    let devices = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let names =
        devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    names.map(detach_from).sum()
}

fn detach_from(device: &str) -> usize {
    let all = GUARDS.iter().flat_map(|(_, _, direction, _)| HANDLES.map(|h| (*direction, h)));
    all.filter(|(direction, handle)| detach_filter(device, *direction, *handle).is_ok()).count()
}

fn classifier<'a>(
    ebpf: &'a mut aya::Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, KernelError> {
    let program =
        ebpf.program_mut(name).ok_or(KernelError::Missing { object: GUARD_OBJECT, name })?;
    program.try_into().map_err(|source| program_error(name, source))
}

fn program_error(program: &'static str, source: ProgramError) -> KernelError {
    KernelError::Program { program, source: Box::new(source) }
}

fn attach_error(program: &'static str, interface: u32, source: std::io::Error) -> KernelError {
    KernelError::Attach { program, target: format!("the node's interface {interface}"), source }
}

/// Removes the filter with our preference and this handle.
fn detach_filter(device: &str, direction: TcAttachType, handle: u16) -> Result<(), ProgramError> {
    use aya::programs::Link as _;
    let handle = TcHandle::new(0, handle);
    SchedClassifierLink::attached(device, direction, PREFERENCE, handle, None)
        .map_err(|error| ProgramError::TcError(TcError::IoError(error)))?
        .detach()
}

fn device_name(interface: u32) -> std::io::Result<String> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    Ok(rustix::net::netdevice::index_to_name(socket, interface)?)
}
