"""Which of a VM's TSCs were written, and whether more writes are to be expected.  Pure.

A VMM writes the TSCs of a VM one vCPU after another, some of them twice: QEMU during each load and
each reset, others when they restore a VM.  Meanwhile the TSCs are apart and KVM's count is low,
which means nothing.  It is over when the VM runs.  A vCPU that is plugged is written alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TscWrites:
    """The writes of one VM's TSCs, as ``kvm_track_tsc`` and the TSC calls show them."""

    awaited: set[int] = field(default_factory=set)
    """vCPUs that were given a frequency and whose TSC is still to be written."""
    under_way: bool = False
    """TSCs were written, and more may follow before the VM runs."""
    generation: set[int] = field(default_factory=set)
    """The vCPUs whose TSCs KVM considers synchronised (``kvm_track_tsc_matching``)."""
    since_reading: bool = False
    """There was a write or a call since the lines were read last."""

    @property
    def are_over(self) -> bool:
        """Whether no further write is to be expected."""
        return not self.awaited and not self.under_way

    def goes_on(self) -> None:
        """Note a call after which the VMM makes others."""
        self.since_reading = True

    def frequency_given(self, vcpu: int) -> None:
        """Note a call after which the VMM writes the vCPU's TSC."""
        self.awaited.add(vcpu)
        self.since_reading = True

    def written(self, vcpu: int, synchronised: int, of_plug: bool) -> None:
        """Note that a vCPU's TSC was written.

        :param synchronised: KVM's count afterwards; 1 begins a new generation.
        :param of_plug: the vCPU's last call was that of a plug.
        """
        self.since_reading = True
        self.under_way = not (of_plug and vcpu in self.awaited)
        self.awaited.discard(vcpu)
        if synchronised == 1:
            self.generation.clear()
        self.generation.add(vcpu)

    def removed(self, vcpu: int) -> None:
        """Note that a vCPU was unplugged, although KVM keeps it."""
        self.awaited.discard(vcpu)

    def vm_runs(self) -> None:
        """Note that a vCPU enters the guest, or is about to."""
        self.under_way = False

    def vm_resumes(self) -> None:
        """Note that the VM starts or resumes, so that no vCPU is being plugged either."""
        self.under_way = False
        self.awaited.clear()

    def read(self) -> bool:
        """Note that the lines were read; return whether nothing has happened since the last time.

        If so, no write is under way, even if the end of the writes was not seen.
        """
        is_quiet = not self.since_reading
        if is_quiet:
            self.awaited.clear()
            self.under_way = False
        self.since_reading = False
        return is_quiet
