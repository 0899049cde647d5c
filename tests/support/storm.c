/*
 * Issues KVM_GET_TSC_KHZ and KVM_SET_TSC_KHZ as fast as possible, from one thread per vCPU:
 *
 *     storm VMS VCPUS CALLS
 *
 * VCPUS is per VM, CALLS per vCPU. Each vCPU first makes one call. The program then prints "ready",
 * waits for a byte on standard input, makes the remaining calls, prints the total number of calls,
 * and exits when its standard input is closed.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

struct vcpu {
	pthread_t thread;
	int fd;
	long made;
};

static pthread_barrier_t begin;
static long calls;

static void *storm(void *of)
{
	struct vcpu *vcpu = of;
	int khz = ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0);

	vcpu->made = 1;
	pthread_barrier_wait(&begin);
	pthread_barrier_wait(&begin);
	for (; vcpu->made < calls; vcpu->made++) {
		if (vcpu->made % 2)
			ioctl(vcpu->fd, KVM_SET_TSC_KHZ, khz);
		else
			ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vms = argc > 3 ? atoi(argv[1]) : 0, each = argc > 3 ? atoi(argv[2]) : 0;
	struct vcpu *vcpus = calloc(vms * each + 1, sizeof(*vcpus));
	long made = 0;

	if (kvm < 0 || !vcpus || !vms)
		return 1;
	calls = atol(argv[3]);
	pthread_barrier_init(&begin, NULL, vms * each + 1);
	for (int vm = 0; vm < vms; vm++) {
		int fd = ioctl(kvm, KVM_CREATE_VM, 0);

		for (int id = 0; id < each; id++) {
			struct vcpu *vcpu = &vcpus[vm * each + id];

			vcpu->fd = ioctl(fd, KVM_CREATE_VCPU, id);
			if (vcpu->fd < 0 || pthread_create(&vcpu->thread, NULL, storm, vcpu))
				return 1;
		}
	}
	pthread_barrier_wait(&begin);
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		return 1;
	pthread_barrier_wait(&begin);
	for (int at = 0; at < vms * each; at++) {
		pthread_join(vcpus[at].thread, NULL);
		made += vcpus[at].made;
	}
	printf("%ld\n", made);
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}
