//! Following the workloads root: the kubelet, or systemd, may remove and make it again, and
//! links stay with the directory that is gone.

use std::io;

use super::{
    HOOKS, KernelError, MAIN, MAIN_OBJECT, ObjectLoader, Programs, Root, load_program, program_fd,
};

impl Programs {
    /// Attaches the programs to the workloads root again when that directory is another one
    /// than it was; true when it was. One that is not there at all is waited for.
    ///
    /// # Errors
    /// As [`Programs::load`]; it is tried again with the next call.
    pub fn follow_workloads(&mut self) -> Result<bool, KernelError> {
        let found = match self.hierarchy.open(&self.workloads.name) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => {
                let what = self.workloads.path.display().to_string();
                return Err(KernelError::Io { what, source });
            }
        };
        // While another version's programs decide, these are attached when they are swapped in.
        if found.id == self.workloads.id || self.is_waiting() {
            return Ok(false);
        }
        let mut ebpf =
            ObjectLoader::new(MAIN, MAIN_OBJECT, self.pins.maps(), self.features.bits()).load()?;
        let before = std::mem::replace(&mut self.workloads, found);
        for (program, hook, root) in HOOKS {
            if root != Root::Workloads {
                continue;
            }
            let attached = load_program(&mut ebpf, MAIN_OBJECT, program)
                .and_then(|()| program_fd(&mut ebpf, MAIN_OBJECT, program))
                .and_then(|fd| self.attach_hook(program, hook, root, fd));
            if let Err(error) = attached {
                self.workloads = before;
                return Err(error);
            }
        }
        Ok(true)
    }
}
