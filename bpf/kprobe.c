/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * Kprobes on KVM. Of these programs, a KVM_RUN executes only the first compare in enter_vcpu_ioctl:
 * the return probe is on kvm_arch_vcpu_ioctl, which KVM_RUN does not reach, because kvm_vcpu_ioctl
 * handles it before.
 */

/*
 * The part of struct pt_regs (x86-64) that the probes need. <linux/ptrace.h> is not used because it
 * includes much of the kernel's headers.
 */
struct probe_context {
	u64 before[10];
	u64 ax, cx, dx, si, di;
};

/* kvm_vcpu_ioctl(struct file *filp, unsigned int ioctl, unsigned long arg) */
int enter_vcpu_ioctl(struct probe_context *ctx)
{
	if ((u32)ctx->si != KVM_RUN)
		rest.call(ctx, REST_OF_ENTER);
	return 0;
}

int rest_of_enter(struct probe_context *ctx)
{
	u32 cmd = ctx->si;
	u64 vcpu, kvm;

	abandon_call();
	if (cmd != KVM_SET_TSC_KHZ && cmd != KVM_GET_TSC_KHZ && cmd != KVM_SET_REGS &&
	    cmd != KVM_SET_SREGS && cmd != KVM_SET_SREGS2 && cmd != KVM_SET_CPUID2)
		return 0;
	vcpu = read_u64(ctx->di + FILE_PRIVATE_DATA_OFFSET);
	kvm = read_u64(vcpu + VCPU_KVM_OFFSET);
	if (report_existing_vcpu(vcpu, cmd, ctx->dx) || is_foreign(kvm))
		return 0;
	if (cmd == KVM_SET_TSC_KHZ || cmd == KVM_GET_TSC_KHZ)
		call_begins(kvm, vcpu, cmd, ctx->dx);
	else
		remember_cold_command(vcpu, cmd);
	return 0;
}

/* kvm_arch_vm_ioctl(struct file *filp, unsigned int ioctl, unsigned long arg): rarely called */
int enter_vm_ioctl(struct probe_context *ctx)
{
	u32 cmd = ctx->si;

	if (cmd == KVM_SET_TSC_KHZ || cmd == KVM_GET_TSC_KHZ)
		call_begins(read_u64(ctx->di + FILE_PRIVATE_DATA_OFFSET), 0, cmd, ctx->dx);
	else if (cmd == KVM_SET_CLOCK)
		send(OP_VM_STARTED, read_u64(ctx->di + FILE_PRIVATE_DATA_OFFSET), 0, -1, 0, 0);
	return 0;
}

/*
 * The returns of kvm_arch_vm_ioctl and of kvm_arch_vcpu_ioctl. If the kernel has no symbol for the
 * latter, this is attached to the return of kvm_vcpu_ioctl instead.
 */
int leave_ioctl(struct probe_context *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct call *call = calls.lookup(&tid);

	if (!call)
		return 0;
	tsc_call_ends(call, (s64)ctx->ax);
	forget_call(tid);
	return 0;
}

/* kvm_arch_init_vm(struct kvm *kvm, unsigned long type) */
int enter_init_vm(struct probe_context *ctx)
{
	vm_created(ctx->di, -1);
	return 0;
}

/* kvm_arch_vcpu_postcreate(struct kvm_vcpu *vcpu): called only if the creation succeeded. */
int enter_vcpu_postcreate(struct probe_context *ctx)
{
	vcpu_created(ctx->di);
	return 0;
}

/* kvm_arch_destroy_vm(struct kvm *kvm): called when the last file of the VM is closed. */
int enter_destroy_vm(struct probe_context *ctx)
{
	u64 kvm = ctx->di;

	send(OP_VM_END, kvm, 0, -1, 0, 0);
	first_vcpus.delete(&kvm);
	return 0;
}
