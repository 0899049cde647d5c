/*
 * A firmware that ejects a CPU on request: it does what the ACPI method _EJ0 does, with QEMU's CPU
 * hotplug registers (docs/specs/acpi_cpu_hotplug.rst) at PORT. It is 64 KiB, as QEMU requires, and
 * the CPU begins 16 bytes before its end.
 */
#define SELECTOR PORT
#define FLAGS (PORT + 4)
#define REMOVE_EVENT 0x4
#define EJECT 0x8
#define CPUS 4

	.code16
	.org	0xff00
start:
	cli
look:
	xor	%ecx, %ecx
next:
	mov	$SELECTOR, %dx
	mov	%ecx, %eax
	out	%eax, %dx		/* the first write also switches off the legacy interface */
	mov	$FLAGS, %dx
	in	%dx, %al
	test	$REMOVE_EVENT, %al
	jz	keep
	mov	$REMOVE_EVENT, %al
	out	%al, %dx
	mov	$EJECT, %al
	out	%al, %dx
keep:
	inc	%ecx
	cmp	$CPUS, %ecx
	jb	next
	jmp	look
	.org	0xfff0
	jmp	start
	.org	0x10000
