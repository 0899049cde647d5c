/*
 * A VMM whose functions have the names of QEMU's, and issue the same ioctls. It stands in for a QEMU
 * with symbols, which distributions do not ship.
 *
 * Each line on standard input is a command: boot, complete, plug or load. "done" is printed at the
 * start and after each command.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#define QEMU_FUNCTION __attribute__((noinline)) void

static int vm, vcpus[8], count;

QEMU_FUNCTION kvm_arch_init_vcpu(int vcpu)
{
	struct kvm_cpuid2 none = {0};

	ioctl(vcpu, KVM_GET_TSC_KHZ, 0);
	ioctl(vcpu, KVM_SET_CPUID2, &none);
}

QEMU_FUNCTION do_kvm_cpu_synchronize_post_init(int vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs;

	ioctl(vcpu, KVM_GET_SREGS, &sregs);
	ioctl(vcpu, KVM_SET_SREGS, &sregs);
	ioctl(vcpu, KVM_SET_TSC_KHZ, ioctl(vcpu, KVM_GET_TSC_KHZ, 0));
	ioctl(vcpu, KVM_GET_REGS, &regs);
	ioctl(vcpu, KVM_SET_REGS, &regs);
}

static void add_vcpu(void)
{
	vcpus[count] = ioctl(vm, KVM_CREATE_VCPU, count);
	kvm_arch_init_vcpu(vcpus[count++]);
}

static void write_all(void)
{
	for (int i = 0; i < count; i++)
		do_kvm_cpu_synchronize_post_init(vcpus[i]);
}

QEMU_FUNCTION qdev_machine_creation_done(void)
{
	write_all();
}

QEMU_FUNCTION qdev_device_add_from_qdict(void)
{
	add_vcpu();
	do_kvm_cpu_synchronize_post_init(vcpus[count - 1]);
}

QEMU_FUNCTION load_snapshot(void)
{
	write_all();
}

static void *execute_commands(void *unused)
{
	char line[32];

	while (puts("done"), fflush(stdout), fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "boot\n"))
			add_vcpu();
		else if (!strcmp(line, "complete\n"))
			qdev_machine_creation_done();
		else if (!strcmp(line, "plug\n"))
			qdev_device_add_from_qdict();
		else if (!strcmp(line, "load\n"))
			load_snapshot();
	}
	return unused;
}

/* In QEMU too, the thread that creates the VM creates no vCPU. */
int main(void)
{
	pthread_t thread;

	vm = ioctl(open("/dev/kvm", O_RDWR | O_CLOEXEC), KVM_CREATE_VM, 0);
	pthread_create(&thread, NULL, execute_commands, NULL);
	return pthread_join(thread, NULL);
}
