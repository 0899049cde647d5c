/*
 * Measure KVM_RUN calls that return at once (immediate_exit).  Print "ready"; then, for each count
 * and size read from standard input, issue that many calls, write that many bytes before each, at
 * most MOST, as a guest that evicts the caches, and print the mean time of a call in nanoseconds.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define MOST (1 << 20)
#define CACHE_LINE 64

static volatile char written[MOST];

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
	int state = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, state, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	long times, size;

	if (vcpu < 0 || run == MAP_FAILED)
		return 1;
	run->immediate_exit = 1;
	puts("ready");
	fflush(stdout);
	while (scanf("%ld %ld", &times, &size) == 2 && size <= MOST) {
		double begin = now();

		for (long n = 0; n < times; n++) {
			for (long at = 0; at < size; at += CACHE_LINE)
				written[at]++;
			ioctl(vcpu, KVM_RUN, 0);
		}
		printf("%f\n", (now() - begin) / times);
		fflush(stdout);
	}
	return 0;
}
