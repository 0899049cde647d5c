/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * Tracepoints of the ioctl syscall, for kernels without kprobes. A call counts only if its file is
 * one of KVM's. That follows from the file's name in the anon_inode file system, in which user
 * space cannot create files of its own.
 */

#define KVM_CREATE_VM 0xae01
#define KVM_CREATE_VCPU 0xae41
#define ANON_INODE_FS_MAGIC 0x09041934
#define NAME_KVM_VCPU 0x757063762d6d766bULL /* "kvm-vcpu" */
#define NAME_KVM_VM 0x006d762d6d766bULL /* "kvm-vm" and its terminating 0 */
#define NAME_KVM_VM_MASK 0xffffffffffffffULL

/* Return the struct file * of a descriptor, 0 if there is none; see files_lookup_fd_raw(). */
static __always_inline u64 file_of(u32 fd)
{
	u64 files = read_u64(bpf_get_current_task() + TASK_FILES_OFFSET);
	u64 table = read_u64(files + FILES_FDT_OFFSET);

	if (fd >= (u32)read_s32(table + FDTABLE_MAX_FDS_OFFSET))
		return 0;
	return read_u64(read_u64(table + FDTABLE_FD_OFFSET) + (u64)fd * 8);
}

/*
 * Return the private data of a file of KVM's, a struct kvm_vcpu * or a struct kvm *; 0 if it is
 * another file. wanted is the beginning of the file's name, of which mask selects the bytes.
 */
static __always_inline u64 kvm_object(u32 fd, u64 wanted, u64 mask)
{
	u64 file = file_of(fd);
	u64 inode, superblock, dentry, name;

	if (!file)
		return 0;
	inode = read_u64(file + FILE_INODE_OFFSET);
	superblock = read_u64(inode + INODE_SB_OFFSET);
	if (read_u64(superblock + SUPER_BLOCK_MAGIC_OFFSET) != ANON_INODE_FS_MAGIC)
		return 0;
	dentry = read_u64(file + FILE_DENTRY_OFFSET);
	name = read_u64(read_u64(dentry + DENTRY_NAME_OFFSET));
	if ((name & mask) != wanted)
		return 0;
	return read_u64(file + FILE_PRIVATE_DATA_OFFSET);
}

static __always_inline u64 vcpu_of(u32 fd)
{
	return kvm_object(fd, NAME_KVM_VCPU, ~0ULL);
}

static __always_inline u64 vm_of(u32 fd)
{
	return kvm_object(fd, NAME_KVM_VM, NAME_KVM_VM_MASK);
}

/* As described by events/syscalls/sys_{enter,exit}_ioctl/format in tracefs, which is ABI. */
struct enter {
	u64 common;
	s64 nr;
	u64 fd, cmd, arg;
};

struct exit {
	u64 common;
	s64 nr;
	s64 ret;
};

int sys_enter_ioctl(struct enter *args)
{
	if ((u32)args->cmd != KVM_RUN)
		rest.call(args, REST_OF_ENTER);
	return 0;
}

int sys_exit_ioctl(struct exit *args)
{
	if (any_in_flight()) /* hardly ever: most exits are those of KVM_RUN */
		rest.call(args, REST_OF_EXIT);
	return 0;
}

int rest_of_enter(struct enter *args)
{
	u32 cmd = args->cmd;
	u64 vcpu, kvm;

	if (any_in_flight())
		abandon_call(); /* the kernel skipped the program at its exit */
	if (cmd == KVM_CREATE_VM || cmd == KVM_CREATE_VCPU) {
		call_begins(0, 0, cmd, args->arg);
		return 0;
	}
	if (cmd != KVM_SET_TSC_KHZ && cmd != KVM_GET_TSC_KHZ && cmd != KVM_SET_REGS &&
	    cmd != KVM_SET_SREGS && cmd != KVM_SET_SREGS2 && cmd != KVM_SET_CPUID2 &&
	    cmd != KVM_SET_CLOCK)
		return 0;
	vcpu = vcpu_of(args->fd);
	if (vcpu && report_existing_vcpu(vcpu, cmd, args->arg))
		return 0;
	kvm = vcpu ? read_u64(vcpu + VCPU_KVM_OFFSET) : vm_of(args->fd);
	if (!kvm || is_foreign(kvm))
		return 0;
	if (cmd == KVM_SET_TSC_KHZ || cmd == KVM_GET_TSC_KHZ)
		call_begins(kvm, vcpu, cmd, args->arg);
	else if (cmd != KVM_SET_CLOCK && vcpu)
		remember_cold_command(vcpu, cmd);
	else if (cmd == KVM_SET_CLOCK && !vcpu)
		send(OP_VM_STARTED, kvm, 0, -1, 0, 0);
	return 0;
}

int rest_of_exit(struct exit *args)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct call *call = calls.lookup(&tid);
	u64 created;

	if (!call)
		return 0;
	if (call->cmd == KVM_CREATE_VM) {
		created = args->ret < 0 ? 0 : vm_of(args->ret);
		if (created)
			vm_created(created, args->ret);
	} else if (call->cmd == KVM_CREATE_VCPU) {
		created = args->ret < 0 ? 0 : vcpu_of(args->ret);
		if (created)
			vcpu_created(created);
	} else {
		tsc_call_ends(call, args->ret);
	}
	forget_call(tid);
	return 0;
}
