/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * Shared by both programs: the event that they send, their maps, and the functions that read a vCPU
 * and follow a call.
 *
 * TSC calls are KVM_SET_TSC_KHZ and KVM_GET_TSC_KHZ. Cold commands are those with which a VMM sets
 * up a vCPU. They are not events; the last one on each vCPU is remembered, and the vCPU's next
 * event carries it.
 *
 * The *_OFFSET macros are byte offsets in the running kernel's structs. In the bytecode, each is a
 * placeholder, which tscwatch replaces when it loads the program (tscwatch/linux/compiler.py). The
 * offsets come from the kernel's BTF, so the bytecode is that of any kernel. tscwatch/capture/ebpf.py
 * mirrors struct event and the enums.
 */

/* A 64-bit immediate value that the compiler cannot compute with, so that it stays in one piece. */
#define OFFSET(placeholder)                                             \
	({                                                              \
		u64 offset;                                             \
		asm("%0 = " #placeholder " ll" : "=r"(offset));         \
		offset;                                                 \
	})

#define KVM_RUN 0xae80
/* KVM_SET_DEBUGREGS has the same lowest byte as KVM_SET_TSC_KHZ, so compare all 32 bits. */
#define KVM_SET_TSC_KHZ 0xaea2
#define KVM_GET_TSC_KHZ 0xaea3
#define KVM_SET_REGS 0x4090ae82
#define KVM_SET_SREGS 0x4138ae84
#define KVM_SET_SREGS2 0x4140aecd
#define KVM_SET_CPUID2 0x4008ae90
#define KVM_SET_CLOCK 0x4030ae7b

enum op {
	OP_VM_CREATE = 1,
	OP_VM_STARTED,
	OP_VM_END,
	OP_VCPU_CREATE,
	OP_VCPU_FOUND,
	OP_VCPU_SETUP,
	OP_GET,
	OP_SET,
	OP_LOST
};

/* The last cold command on a vCPU; AFTER_NOTHING if there was none since tscwatch attached. */
enum after { AFTER_NOTHING = 0, AFTER_CREATE, AFTER_CPUID, AFTER_SREGS, AFTER_REGS };

enum count {
	COUNT_SENT = 0,
	COUNT_RING_FULL,
	COUNT_NO_RETURN,
	COUNT_NO_SLOT,
	COUNT_THROTTLED,
	COUNT_FOREIGN,
	COUNTS
};

enum rest { REST_OF_ENTER, REST_OF_EXIT };

/*
 * The events that a process may send in a second: they take up less than half of the ring, and are
 * enough for a VM with 1,000 vCPUs.
 */
#define BUDGET 4096

struct event {
	u64 ts; /* CLOCK_BOOTTIME, ns */
	u64 vm; /* struct kvm *, 0 on OP_LOST */
	u64 arg; /* of a TSC call; OP_VCPU_FOUND: pid of the VMM; OP_LOST: number of events */
	s64 result; /* of a TSC call; OP_VCPU_FOUND: vcpu->arch.virtual_tsc_khz */
	u32 pid;
	u32 tid;
	u32 op;
	s32 vcpu; /* vcpu_id, -1 if the event is not a vCPU's */
	u32 sync; /* writes of special registers on this vCPU so far */
	s32 runner; /* thread of its last KVM_RUN, 0 if it has never run */
	s32 fd; /* of a new VM, -1 if not known */
	u8 after; /* enum after */
	s8 ran; /* whether the VM's first vCPU has run, -1 if not known */
	char comm[16];
};

/* What is remembered of a vCPU. */
struct mark {
	u32 sync;
	u8 after;
};

/* How much of its budget a process has spent in the current second. */
struct spent {
	u64 second;
	u64 events;
};

/* A call that has not returned yet. */
struct call {
	u64 vm; /* 0 for a call that creates a VM or a vCPU */
	u64 vcpu; /* 0 for a call on a VM */
	u64 arg;
	u32 cmd;
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
/*
 * tscwatch maps the counts. If it read them with bpf() and were preempted in that, the kernel would
 * skip the programs of all other tasks on that CPU (bpf_disable_instrumentation).
 */
BPF_F_TABLE("array", u32, u64, counts, COUNTS, BPF_F_MMAPABLE);
BPF_ARRAY(own_pid, u32, 1); /* the pid of tscwatch itself */
/*
 * At least the number of entries in calls. The verifier inlines a look-up in an array, so testing
 * this first costs less than a look-up in calls.
 */
BPF_ARRAY(in_flight, u32, 1);
/* LRU, so that threads killed during a call and VMs whose end was missed do not fill the maps. */
BPF_TABLE("lru_hash", u32, struct call, calls, 16384); /* by thread id */
BPF_TABLE("lru_hash", u64, struct mark, marks, 65536); /* by struct kvm_vcpu * */
/* By struct kvm *: a struct kvm_vcpu *, 0 as long as the VM has no vCPU. */
BPF_TABLE("lru_hash", u64, u64, first_vcpus, 16384);
BPF_TABLE("lru_hash", u32, struct spent, spent, 4096); /* by process id */

/*
 * Programs that those on the path of KVM_RUN call for anything else, by enum rest. A program saves
 * at its entry all registers that it needs anywhere, and its return is at the end of its code. So a
 * large one costs each KVM_RUN several cache lines, which the guest has evicted since the last one.
 */
BPF_PROG_ARRAY(rest, 2);

static __always_inline void count(u32 what)
{
	u64 *n = counts.lookup(&what);

	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline u64 read_u64(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static __always_inline s32 read_s32(u64 address)
{
	s32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

/*
 * Return the thread of a vCPU's last KVM_RUN, 0 if it has never run. kvm_vcpu_ioctl sets vcpu->pid
 * at the first KVM_RUN, and again when the thread changes.
 */
static __always_inline s32 runner_of(u64 vcpu)
{
	u64 pid = read_u64(vcpu + VCPU_PID_OFFSET);

	return pid ? read_s32(pid + PID_NR_OFFSET) : 0;
}

/*
 * Return whether a VM has run, -1 if not known. Its first vCPU decides, because one that was added
 * later may not have run yet although the VM has.
 */
static __always_inline s8 has_run(u64 kvm)
{
	u64 *first = first_vcpus.lookup(&kvm);

	if (!first)
		return -1; /* the VM was created before the probes were attached */
	return *first && runner_of(*first);
}

/* Send an event. For a call on a VM, or for OP_LOST, vcpu is 0. */
static __always_inline void
send_now(u32 op, u64 kvm, u64 vcpu, s32 fd, u64 arg, s64 result)
{
	u64 id = bpf_get_current_pid_tgid();
	struct event *event = events.ringbuf_reserve(sizeof(*event));
	struct mark *mark = 0;

	if (!event) {
		if (op != OP_LOST)
			count(COUNT_RING_FULL);
		return;
	}
	if (vcpu)
		mark = marks.lookup(&vcpu);
	event->ts = bpf_ktime_get_boot_ns();
	event->vm = kvm;
	event->arg = arg;
	event->result = result;
	event->pid = id >> 32;
	event->tid = id;
	event->op = op;
	event->vcpu = vcpu ? read_s32(vcpu + VCPU_ID_OFFSET) : -1;
	event->sync = mark ? mark->sync : 0;
	event->runner = vcpu ? runner_of(vcpu) : 0;
	event->fd = fd;
	event->after = mark ? mark->after : AFTER_NOTHING;
	event->ran = has_run(kvm);
	bpf_get_current_comm(&event->comm, sizeof(event->comm));
	events.ringbuf_submit(event, 0);
	count(COUNT_SENT);
}

/*
 * Send an event unless its process has spent its budget: one process must not fill the ring for all
 * others. The count takes no lock, so it may be off by a few. The first event that is dropped in a
 * second is reported by an OP_LOST, the others only by COUNT_THROTTLED.
 */
static __always_inline void send(u32 op, u64 kvm, u64 vcpu, s32 fd, u64 arg, s64 result)
{
	u64 second = bpf_ktime_get_ns() >> 30; /* about a second, without a division */
	u32 process = bpf_get_current_pid_tgid() >> 32;
	struct spent none = {.second = second};
	struct spent *spent_now = spent.lookup_or_try_init(&process, &none);
	u64 before = 0;

	if (spent_now) {
		if (spent_now->second != second)
			*spent_now = none;
		before = spent_now->events++;
	}
	if (before < BUDGET) {
		send_now(op, kvm, vcpu, fd, arg, result);
		return;
	}
	count(COUNT_THROTTLED);
	if (before == BUDGET)
		send_now(OP_LOST, 0, 0, -1, 1, 0);
}

static __always_inline void vm_created(u64 kvm, s32 fd)
{
	u64 none = 0;

	first_vcpus.update(&kvm, &none); /* the address may have been another VM's */
	send(OP_VM_CREATE, kvm, 0, fd, 0, 0);
}

static __always_inline void vcpu_created(u64 vcpu)
{
	u64 kvm = read_u64(vcpu + VCPU_KVM_OFFSET);
	u64 *first = first_vcpus.lookup(&kvm);
	struct mark mark = {.after = AFTER_CREATE};

	marks.update(&vcpu, &mark);
	if (first && !*first)
		*first = vcpu;
	send(OP_VCPU_CREATE, kvm, vcpu, -1, 0, 0);
}

/*
 * If the caller is tscwatch (tscwatch/capture/existing.py), report the vCPU and return true. The
 * vCPU of a VM that is reported first counts as its first vCPU. pid is the argument of the call.
 */
static __always_inline bool report_existing_vcpu(u64 vcpu, u32 cmd, u64 pid)
{
	u32 *own, zero = 0;
	u64 kvm;

	if (cmd != KVM_GET_TSC_KHZ)
		return false;
	own = own_pid.lookup(&zero);
	if (!own || bpf_get_current_pid_tgid() >> 32 != *own)
		return false;
	kvm = read_u64(vcpu + VCPU_KVM_OFFSET);
	if (!first_vcpus.lookup(&kvm))
		first_vcpus.update(&kvm, &vcpu);
	send_now(OP_VCPU_FOUND, kvm, vcpu, -1, pid, (u32)read_s32(vcpu + VCPU_KHZ_OFFSET));
	return true;
}

/*
 * Remember a cold command: the step of the next TSC call follows from it. The first one after the
 * vCPU was created is also sent as OP_VCPU_SETUP.
 */
static __always_inline void remember_cold_command(u64 vcpu, u32 cmd)
{
	bool sregs = cmd == KVM_SET_SREGS || cmd == KVM_SET_SREGS2;
	struct mark next = {.sync = sregs};
	struct mark *last = marks.lookup(&vcpu);

	next.after = sregs ? AFTER_SREGS : cmd == KVM_SET_REGS ? AFTER_REGS : AFTER_CPUID;
	if (last) {
		next.sync += last->sync;
		if (last->after == AFTER_CREATE)
			send(OP_VCPU_SETUP, read_u64(vcpu + VCPU_KVM_OFFSET), vcpu, -1, 0, 0);
	}
	marks.update(&vcpu, &next);
}

static __always_inline bool any_in_flight(void)
{
	u32 zero = 0, *number = in_flight.lookup(&zero);

	return !number || *number;
}

static __always_inline void add_in_flight(u32 difference)
{
	u32 zero = 0, *number = in_flight.lookup(&zero);

	if (number)
		__sync_fetch_and_add(number, difference);
}

static __always_inline void forget_call(u32 tid)
{
	calls.delete(&tid);
	add_in_flight(-1);
}

/*
 * Forget this thread's last call if its return was not seen, which happens if kvm_vcpu_ioctl itself
 * fails with EIO or EINTR: the call must not be matched with the return of a later one.
 */
static __always_inline void abandon_call(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	if (calls.lookup(&tid)) {
		count(COUNT_NO_RETURN);
		forget_call(tid);
	}
}

/*
 * Count a call by a process other than the VM's and return true: KVM refuses it at its entry with
 * EIO (kvm_vcpu_ioctl, kvm_vm_ioctl). Another tscwatch makes such calls, for example.
 */
static __always_inline bool is_foreign(u64 kvm)
{
	if (read_u64(kvm + KVM_MM_OFFSET) == read_u64(bpf_get_current_task() + TASK_MM_OFFSET))
		return false;
	count(COUNT_FOREIGN);
	return true;
}

static __always_inline void call_begins(u64 vm, u64 vcpu, u32 cmd, u64 arg)
{
	struct call call = {.vm = vm, .vcpu = vcpu, .arg = arg, .cmd = cmd};
	u32 tid = bpf_get_current_pid_tgid();

	abandon_call();
	if (calls.update(&tid, &call))
		count(COUNT_NO_SLOT);
	else
		add_in_flight(1);
}

/* KVM takes the frequency as an unsigned int: drop the upper half of the argument. */
static __always_inline void tsc_call_ends(struct call *call, s64 result)
{
	u32 op = call->cmd == KVM_SET_TSC_KHZ ? OP_SET : OP_GET;

	send(op, call->vm, call->vcpu, -1, (u32)call->arg, result);
}
