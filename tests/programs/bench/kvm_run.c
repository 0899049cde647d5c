/*
 * Measure KVM_RUN calls that return at once (immediate_exit).  Print "ready"; then, for each count
 * read from standard input, issue that many calls and print the mean time of one in nanoseconds.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vcpu = ioctl(ioctl(kvm, KVM_CREATE_VM, 0), KVM_CREATE_VCPU, 0);
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	long times;

	if (vcpu < 0 || run == MAP_FAILED)
		return 1;
	run->immediate_exit = 1;
	puts("ready");
	fflush(stdout);
	while (scanf("%ld", &times) == 1) {
		double begin = now();

		for (long n = 0; n < times; n++)
			ioctl(vcpu, KVM_RUN, 0);
		printf("%f\n", (now() - begin) / times);
		fflush(stdout);
	}
	return 0;
}
