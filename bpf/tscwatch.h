/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * What both kernel programs share: the event, the maps, and reading a vCPU.
 *
 * The *_OFFSET macros are byte offsets in the running kernel's structs. They come
 * from its BTF (tscwatch/linux/btf.py), so no headers of that kernel are needed.
 */

#define KVM_RUN 0xae80
#define KVM_SET_TSC_KHZ 0xaea2 /* also nr 0xa2: KVM_SET_DEBUGREGS, so compare all 32 bits */
#define KVM_GET_TSC_KHZ 0xaea3
#define KVM_SET_REGS 0x4090ae82
#define KVM_SET_SREGS 0x4138ae84
#define KVM_SET_SREGS2 0x4140aecd
#define KVM_SET_CPUID2 0x4008ae90

enum op {
	OP_VM_CREATE = 1,
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
	COUNTS
};

/* Events per process and second: less than half of the ring, and enough for 1,000 vCPUs. */
#define BUDGET 4096

struct event {
	u64 ts; /* CLOCK_MONOTONIC, ns */
	u64 vm; /* struct kvm * */
	u64 arg;
	s64 result;
	u32 pid;
	u32 tid;
	u32 op;
	s32 vcpu; /* KVM's vcpu_id, -1 on an event of the VM */
	u32 sync; /* full-state writes begun on this vCPU so far */
	s32 runner; /* thread of its last KVM_RUN, 0 if it has never run */
	s32 fd; /* of a new VM, -1 if not known */
	u8 after;
	s8 ran; /* whether the VM's first vCPU has run, -1 if not known */
	char comm[16];
};

struct mark {
	u32 sync;
	u8 after;
};

struct spent {
	u64 second;
	u64 events;
};

struct call {
	u64 vm;
	u64 vcpu; /* 0 for a call on the VM itself */
	u64 arg;
	u32 cmd;
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_PERCPU_ARRAY(counts, u64, COUNTS);
BPF_ARRAY(observer, u32, 1); /* the pid of tscwatch */
/*
 * An upper bound of the number of entries in calls. The verifier inlines look-ups in an array, so
 * testing this first costs less than a look-up in calls.
 */
BPF_ARRAY(in_flight, u32, 1);
/* LRU, so that threads killed during a call and VMs whose end was missed do not fill the maps. */
BPF_TABLE("lru_hash", u32, struct call, calls, 16384);
BPF_TABLE("lru_hash", u64, struct mark, marks, 65536);
BPF_TABLE("lru_hash", u64, u64, first_vcpus, 16384);
BPF_TABLE("lru_hash", u32, struct spent, spent, 4096);

static __always_inline void count(u32 what)
{
	u64 *n = counts.lookup(&what);

	if (n)
		(*n)++;
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

/* kvm_vcpu_ioctl sets vcpu->pid at the first KVM_RUN, and again when the thread changes. */
static __always_inline s32 runner_of(u64 vcpu)
{
	u64 pid = read_u64(vcpu + VCPU_PID_OFFSET);

	return pid ? read_s32(pid + PID_NR_OFFSET) : 0;
}

/* Look at the VM's first vCPU, which is never the vCPU that is being added. */
static __always_inline s8 has_run(u64 kvm)
{
	u64 *first = first_vcpus.lookup(&kvm);

	if (!first)
		return -1; /* the VM is older than the probes */
	return *first && runner_of(*first);
}

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
	event->ts = bpf_ktime_get_ns();
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
 * Send an event unless its process has used up its budget: one process must not fill the ring for
 * all others. The count takes no lock and may be off by a few. OP_LOST reports the first event that
 * is dropped.
 */
static __always_inline void send(u32 op, u64 kvm, u64 vcpu, s32 fd, u64 arg, s64 result)
{
	u64 second = bpf_ktime_get_ns() >> 30;
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
 * Report a vCPU on which tscwatch itself has called KVM (tscwatch/capture/existing.py). The first
 * one reported of a VM counts as its first vCPU. Return whether the call was tscwatch's.
 */
static __always_inline bool report_existing_vcpu(u64 vcpu, u32 cmd, u64 pid)
{
	u32 *own_pid, only = 0;
	u64 kvm;

	if (cmd != KVM_GET_TSC_KHZ)
		return false;
	own_pid = observer.lookup(&only);
	if (!own_pid || bpf_get_current_pid_tgid() >> 32 != *own_pid)
		return false;
	kvm = read_u64(vcpu + VCPU_KVM_OFFSET);
	if (!first_vcpus.lookup(&kvm))
		first_vcpus.update(&kvm, &vcpu);
	send_now(OP_VCPU_FOUND, kvm, vcpu, -1, pid, (u32)read_s32(vcpu + VCPU_KHZ_OFFSET));
	return true;
}

/* Remember a cold command: the next TSC call's step follows from it. */
static __always_inline void remember(u64 vcpu, u32 cmd)
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
	u32 only = 0, *calls_now = in_flight.lookup(&only);

	return !calls_now || *calls_now;
}

static __always_inline void add_in_flight(u32 calls_more)
{
	u32 only = 0, *calls_now = in_flight.lookup(&only);

	if (calls_now)
		__sync_fetch_and_add(calls_now, calls_more);
}

static __always_inline void forget_call(u32 tid)
{
	calls.delete(&tid);
	add_in_flight(-1);
}

/* Drop a call that failed (EIO, EINTR) before its end was seen: it must not match a later end. */
static __always_inline void abandon_call(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	if (calls.lookup(&tid)) {
		count(COUNT_NO_RETURN);
		forget_call(tid);
	}
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

static __always_inline void tsc_call_ends(struct call *call, s64 result)
{
	u32 op = call->cmd == KVM_SET_TSC_KHZ ? OP_SET : OP_GET;

	send(op, call->vm, call->vcpu, -1, (u32)call->arg, result);
}
