# make setup    all that the other targets need, on a fresh Debian machine, as root
# make demo     a real guest's life, watched
# make test     lint, types, and the pure, live and lab tiers
# make matrix   each scenario on each machine type, source and kernel, beside strace
# make bench    what it costs, beside others that could do the same
# make soak     guests that come and go for MINUTES (60), watched by both sources
# make e2e      the package under a Debian's systemd, a skewed guest, and its alert
# make grafana  the dashboard and Grafana's alert rules, anew
# make install  into DESTDIR: program, unit, example configuration, manual, completions
# make deb      build/tscwatch_VERSION_all.deb
# make test-deb the package, installed and removed in clean Debian 12 and 13 trees

PYTHON = .venv/bin/python
HOST = python3-bpfcc linux-headers-amd64 qemu-system-x86 qemu-utils
COMPILER = gcc libc6-dev binutils
LAB = linux-image-amd64 busybox-static kmod udev
LAB_TESTS = tests/live/test_scenarios.py tests/live/test_oracle.py \
	tests/live/test_frequency.py::test_the_vms_own_frequency_is_the_default_of_its_vcpus \
	tests/live/test_frequency.py::test_a_running_vcpu_that_is_given_another_frequency \
	tests/live/test_restart.py::test_a_skew_is_active_again_after_a_kill \
	tests/live/test_storm.py::test_each_call_is_told_or_counted_as_lost \
	'tests/live/test_faults.py::test_a_call_that_kvm_does_not_take_is_no_other_calls_result[bcc]' \
	tests/live/test_crosscheck.py::test_kvm_sees_the_skew_and_gives_up_its_master_clock tests/lab
LIBVIRT = libvirt-daemon-system libvirt-clients
SERVICE = systemd openssl procps prometheus prometheus-alertmanager rpmlint debootstrap chromium
PACKAGES = $(HOST) $(LAB) $(COMPILER) $(LIBVIRT) $(SERVICE) python3-venv python3-prometheus-client \
	python3-yaml strace bpftrace bpfcc-tools linux-perf

comma = ,
empty =
DEBIAN_13 = $(subst $(empty) ,$(comma),python3-bpfcc linux-image-amd64 linux-headers-amd64 \
	qemu-system-x86 qemu-utils busybox-static kmod strace procps udev python3-prometheus-client \
	python3-yaml iproute2 gcc \
	systemd-sysv initramfs-tools qemu-guest-agent)

.PHONY: setup demo test lint test-pure test-live test-lab matrix e2e soak bench recordings grafana install deb test-deb

setup: .venv/ready
	@grep -qs ' /sys/kernel/tracing ' /proc/mounts || { echo 'mounting tracefs'; mount -t tracefs none /sys/kernel/tracing; }
	@grep -qs ' /sys/kernel/debug ' /proc/mounts || { echo 'mounting debugfs'; mount -t debugfs none /sys/kernel/debug; }

.venv/ready: pyproject.toml
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(PACKAGES)
	/usr/bin/python3 -m venv --system-site-packages .venv
	.venv/bin/pip install -q -e '.[dev]'
	touch $@

demo: setup
	$(PYTHON) -m tests.programs.demo

test: lint test-pure test-live test-lab

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test-pure: setup
	$(PYTHON) -m pytest tests/pure

test-live: setup
	$(PYTHON) -m pytest tests/live

# The live tests that depend on the source once more, on a kernel with kprobes, and those that
# only such a kernel carries.
test-lab: setup
	$(PYTHON) -m tests.support.lab_vm $(abspath $(PYTHON)) -m pytest -v $(LAB_TESTS)

matrix: setup .lab/trixie
	$(PYTHON) -m tests.programs.matrix

.lab/trixie:
	mkdir -p $@.part
	debootstrap --variant=minbase --include=$(DEBIAN_13) trixie $@.part
	mv $@.part $@

e2e: deb .lab/trixie
	$(PYTHON) -m tests.programs.e2e build/tscwatch_$(VERSION)_all.deb

MINUTES = 60

soak: setup
	$(PYTHON) -m tests.programs.soak $(MINUTES)

bench: setup
	$(PYTHON) -m tests.programs.bench
	$(PYTHON) -m tests.support.lab_vm $(abspath $(PYTHON)) -m tests.programs.bench.host

# New recordings for the pure tier, of this kernel's sources and of the lab's.
recordings: setup
	$(PYTHON) -m tests.programs.record
	$(PYTHON) -m tests.support.lab_vm $(abspath $(PYTHON)) -m tests.programs.record

grafana: setup
	$(PYTHON) deploy/grafana/generate.py

PREFIX = /usr
TOOLS = .venv/bin/
PYTHONLIB = $(PREFIX)/lib/python3/dist-packages
VERSION = $(shell sed -n 's/__version__ = "\(.*\)"/\1/p' tscwatch/__init__.py)
SHARE = $(DESTDIR)$(PREFIX)/share
DOC = $(SHARE)/doc/tscwatch
ROOMS = . analysis capture host linux publish

install: $(if $(TOOLS),setup)
	for room in $(ROOMS); do \
		install -d $(DESTDIR)$(PYTHONLIB)/tscwatch/$$room && \
		install -m 644 tscwatch/$$room/*.py $(DESTDIR)$(PYTHONLIB)/tscwatch/$$room || exit 1; \
	done
	install -d $(DESTDIR)$(PYTHONLIB)/tscwatch/bpf
	install -m 644 tscwatch/py.typed $(DESTDIR)$(PYTHONLIB)/tscwatch
	install -m 644 bpf/* $(DESTDIR)$(PYTHONLIB)/tscwatch/bpf
	install -D -m 755 deploy/tscwatch $(DESTDIR)$(PREFIX)/bin/tscwatch
	install -D -m 644 deploy/tscwatch.yaml $(DESTDIR)/etc/tscwatch/tscwatch.yaml
	install -D -m 644 deploy/systemd/tscwatch.service $(DESTDIR)$(PREFIX)/lib/systemd/system/tscwatch.service
	install -d $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions
	$(TOOLS)argparse-manpage --module tscwatch.cli --function parser --prog tscwatch \
		--project-name tscwatch --version $(VERSION) | gzip -9n > $(SHARE)/man/man1/tscwatch.1.gz
	$(TOOLS)shtab --shell=bash tscwatch.cli.parser > $(SHARE)/bash-completion/completions/tscwatch
	$(TOOLS)shtab --shell=zsh tscwatch.cli.parser > $(SHARE)/zsh/site-functions/_tscwatch
	install -d $(DOC)/prometheus $(DOC)/grafana
	install -m 644 deploy/grafana/*.json $(DOC)/grafana
	install -m 644 README.md CHANGELOG.md deploy/RUNBOOK.md $(DOC)
	install -m 644 deploy/prometheus/*.yml $(DOC)/prometheus

deb: setup
	rm -rf build/deb
	$(MAKE) install DESTDIR=build/deb
	install -D -m 644 LICENSE build/deb/usr/share/doc/tscwatch/copyright
	install -d build/deb/DEBIAN
	sed 's/@VERSION@/$(VERSION)/' deploy/debian/control > build/deb/DEBIAN/control
	install -m 644 deploy/debian/conffiles build/deb/DEBIAN
	install -m 755 deploy/debian/postinst deploy/debian/prerm deploy/debian/postrm build/deb/DEBIAN
	dpkg-deb --root-owner-group --build build/deb build/tscwatch_$(VERSION)_all.deb

test-deb: deb
	$(PYTHON) -m tests.programs.deb build/tscwatch_$(VERSION)_all.deb
