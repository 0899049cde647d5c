# `make` alone lists the targets. Each target installs what it needs, once; the stamps are in .venv.
# Only missing Debian packages are installed, and only that and the mounts of `setup` need root.

SYSTEM_PYTHON = /usr/bin/python3
PYTHON = .venv/bin/python
LAB = $(PYTHON) -m tests.support.lab_vm

# Debian packages by purpose.
PACKAGES_run = python3-bpfcc python3-prometheus-client python3-yaml linux-headers-amd64 \
	qemu-system-x86 qemu-utils
PACKAGES_tools = prometheus prometheus-alertmanager rpm rpmlint chromium zsh bash-completion man-db
PACKAGES_live = gcc libc6-dev binutils strace libvirt-daemon-system libvirt-clients systemd \
	openssl procps runc prometheus prometheus-alertmanager chromium tmux
PACKAGES_lab = linux-image-amd64 busybox-static kmod udev file iproute2 gcc libc6-dev strace
PACKAGES_soak = gcc
PACKAGES_bench = gcc libc6-dev strace bpftrace bpfcc-tools linux-perf
PACKAGES_debian = debootstrap
PACKAGES_e2e = e2fsprogs
PACKAGES_deb = build-essential dpkg-dev debhelper dh-python
PACKAGES_test-deb = mmdebstrap lintian
PACKAGES_test-bare = mmdebstrap
PACKAGES_rpm = rpm
PACKAGES_image = mmdebstrap
PACKAGES_test-image = umoci runc golang-github-containers-common

# The other Debians in .lab, without bcc and kernel headers. `make e2e` also boots trixie without virtme-ng.
LABS = bullseye trixie sid
DEBIAN = linux-image-amd64 qemu-system-x86 qemu-utils busybox-static kmod strace procps udev \
	python3-prometheus-client python3-yaml iproute2 gcc
DEBIAN_trixie = systemd-sysv initramfs-tools qemu-guest-agent
comma = ,
empty =

.PHONY: help setup setup-build setup-test setup-tools setup-live setup-lab demo test test-all lint \
	test-pure test-tools test-live test-lab matrix e2e soak soak-lab faults bench recordings rules \
	grafana pictures \
	kubernetes install bpf dist deb test-deb rpm image test-image test-bare
.NOTPARALLEL:

help: ## print this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# The virtual environment, and stamps in it: packages-SET for a set of Debian packages, extra-NAME
# for the optional dependencies of that name in pyproject.toml.

.venv/bin/pip:
	@$(SYSTEM_PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call apt_install,python3-venv); }
	$(SYSTEM_PYTHON) -m venv --system-site-packages .venv

.venv/packages-%: Makefile | .venv/bin/pip
	@missing=; for package in $(PACKAGES_$*); do \
		dpkg-query -W -f '$${db:Status-Abbrev}' $$package 2>/dev/null | grep -q '^.i' || \
			missing="$$missing $$package"; \
	done; \
	[ -z "$$missing" ] || { $(call apt_install,$$missing); }
	@touch $@

.venv/extra-%: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install -q -e '.[$*]'
	@touch $@

apt_install = apt-get update -q && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(1)
mount_once = grep -qs ' $(2) ' /proc/mounts || { echo 'mounting $(1)'; mount -t $(1) none $(2); }

setup: .venv/packages-run .venv/extra-demo ## install what `tscwatch run` and `make demo` need
	-@$(call mount_once,tracefs,/sys/kernel/tracing)
	-@$(call mount_once,debugfs,/sys/kernel/debug)

setup-build: .venv/extra-build ## install what `make dist` needs

setup-test: .venv/extra-dev ## install what `make lint` and `make test-pure` need

# Debian 13's kubectl, beside any other: that of Debian 12 is too old for the overlays.
.lab/kubectl: | .venv/packages-image
	rm -rf $@.part
	mkdir -p .lab
	mmdebstrap --quiet --variant=extract --include=kubernetes-client trixie $@.part
	mv $@.part $@

# Grafana's components, from npm. Debian's nodejs and npm only if there is no npm yet: other packages
# of nodejs have it.
PAGE = tests/support/grafana

$(PAGE)/node_modules/.package-lock.json: $(PAGE)/package-lock.json
	@command -v npm >/dev/null || { $(call apt_install,nodejs npm); }
	cd $(PAGE) && npm ci

$(PAGE)/build/page.js: $(PAGE)/node_modules/.package-lock.json $(wildcard $(PAGE)/*.jsx)
	cd $(PAGE) && npm run build

setup-tools: setup-test .venv/packages-tools .venv/packages-rpm .lab/kubectl ## install what `make test-tools` needs

setup-live: setup setup-test .venv/packages-live $(PAGE)/build/page.js ## install what `make test-live` needs

setup-lab: .venv/packages-run .venv/packages-lab .venv/extra-lab ## install what the lab VM needs

demo: setup ## watch a real guest boot, hotplug, load a snapshot and migrate into a skew
	$(PYTHON) -m tests.programs.demo

SUITE = $(PYTHON) -m tests.programs.suite
# Whether /dev/kvm can be opened; without it, the live tests are skipped.
HAS_KVM = $(shell [ -c /dev/kvm ] && sh -c ': <>/dev/kvm' 2>/dev/null && echo yes)
# The packages come first: pip then leaves alone what the distribution has.
SETUP = $(if $(HAS_KVM),setup-live) setup-tools setup-lab

test: $(SETUP) ## run lint, the pure, tools and live tests, and the most important of the lab
	$(SUITE) rpm lint pure tools live lab-ftrace-short lab-bcc-short

test-all: $(SETUP) $(patsubst %,.venv/packages-%,deb debian e2e image test-deb test-image) ## run all tests
	$(SUITE) packages live image bare-12-kvm bare-13-kvm lab-ftrace lab-bcc e2e deb bare-12 bare-13 \
		tools pure lint

lint: setup-test ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test-pure: setup-test ## run the tests that need no root, no KVM and no guest
	$(SUITE) pure

test-tools: setup-tools ## test the packages and what is generated with other programs; no KVM
	$(SUITE) rpm tools

test-live: setup-live ## run the tests on this machine's kernel; as root, with /dev/kvm
	$(SUITE) live

# Inside the lab run its own tests, and the live tests whose result depends on the kernel.
test-lab: setup-lab setup-test ## run the tests in two VMs whose kernel has kprobes
	-$(MAKE) -s bpf # without it, each VM compiles the programs by itself
	$(SUITE) lab-bcc lab-ftrace

matrix: setup-live setup-lab deb $(LABS:%=.lab/%) ## compare each scenario with strace on five kernels
	$(PYTHON) -m tests.programs.matrix $(DEB)

.lab/%: | .venv/packages-debian
	rm -rf $@.part
	mkdir -p $@.part
	debootstrap --variant=minbase --include=$(subst $(empty) ,$(comma),$(strip $(DEBIAN) $(DEBIAN_$*))) \
		$* $@.part
	mv $@.part $@

e2e: deb setup-live .lab/trixie .venv/packages-e2e ## install the package in a VM and wait for a skewed guest's alert
	$(PYTHON) -m tests.programs.e2e $(DEB)

MINUTES = 60

soak: setup .venv/packages-soak ## start and end guests for MINUTES (60), and look for leaks
	$(PYTHON) -m tests.programs.soak $(MINUTES)

soak-lab: MINUTES = 10
soak-lab: setup-lab ## soak on the lab's kernel, for MINUTES (10)
	$(LAB) $(abspath $(PYTHON)) -m tests.programs.soak $(MINUTES)

ONLY =
faults: setup-test ## put faults into copies of the checkout, and run the tests that must fail
	$(PYTHON) -m tests.programs.faults "$(ONLY)"

bench: setup setup-test setup-lab .venv/packages-bench ## measure the cost of tscwatch and of other tools
	$(PYTHON) -m tests.programs.bench
	$(LAB) $(abspath $(PYTHON)) -m tests.programs.bench.host

recordings: setup-live setup-lab deb .lab/sid ## record the scenarios for the pure tests
	$(PYTHON) -m tests.programs.record
	$(LAB) $(abspath $(PYTHON)) -m tests.programs.record
	$(LAB) --root .lab/sid $(DEB) /usr/bin/python3 -m tests.programs.record

# SELECTOR and RUNBOOK: see "Alerts" in the README.
RUNBOOK_OPTION = $(if $(RUNBOOK),--runbook '$(RUNBOOK)')

rules: setup-test ## generate the alert rules for Prometheus, Kubernetes and Grafana
	$(PYTHON) -m deploy.alerts.generate $(if $(SELECTOR),--selector '$(SELECTOR)') $(RUNBOOK_OPTION)

grafana: setup-test ## generate the dashboard
	$(PYTHON) -m deploy.grafana.generate $(RUNBOOK_OPTION)

pictures: setup-live ## draw the README's pictures
	$(PYTHON) -m tests.programs.pictures

kubernetes: grafana ## generate the manifest with the dashboard
	$(PYTHON) deploy/kubernetes/generate.py

PREFIX = /usr
PYTHONLIB = $(PREFIX)/lib/python3/dist-packages
ZSH_COMPLETIONS = $(PREFIX)/share/zsh/site-functions
SHARE = $(DESTDIR)$(PREFIX)/share
DOC = $(SHARE)/doc/tscwatch
ROOMS = . analysis capture host linux publish
# Installed as documentation; in the README, the links to them lose the directory deploy/.
DOCS = $(shell cd deploy && find * -name '*.md' -o -name '*.png' -o -name '*.json' \
	-o -name '*.yaml' -o -name '*.yml' -o -name '*.service')

install: ## install everything into DESTDIR, for a package or to /usr
	for room in $(ROOMS); do \
		install -d $(DESTDIR)$(PYTHONLIB)/tscwatch/$$room && \
		install -m 644 tscwatch/$$room/*.py $(DESTDIR)$(PYTHONLIB)/tscwatch/$$room || exit 1; \
	done
	install -d $(DESTDIR)$(PYTHONLIB)/tscwatch/bpf
	install -m 644 tscwatch/py.typed $(DESTDIR)$(PYTHONLIB)/tscwatch
	install -m 644 bpf/* $(wildcard build/bpf/*) $(DESTDIR)$(PYTHONLIB)/tscwatch/bpf
	install -D -m 755 deploy/tscwatch $(DESTDIR)$(PREFIX)/bin/tscwatch
	install -D -m 644 deploy/tscwatch.yaml $(DESTDIR)/etc/tscwatch/tscwatch.yaml
	install -D -m 644 deploy/systemd/tscwatch.service $(DESTDIR)$(PREFIX)/lib/systemd/system/tscwatch.service
	install -d $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(DESTDIR)$(ZSH_COMPLETIONS)
	$(SYSTEM_PYTHON) -m deploy.manual README.md > $(SHARE)/man/man1/tscwatch.1
	$(SYSTEM_PYTHON) -m deploy.completions bash > $(SHARE)/bash-completion/completions/tscwatch
	$(SYSTEM_PYTHON) -m deploy.completions zsh > $(DESTDIR)$(ZSH_COMPLETIONS)/_tscwatch
	for file in $(DOCS); do install -D -m 644 deploy/$$file $(DOC)/$$file || exit 1; done
	install -D -m 644 tests/MATRIX.md $(DOC)/tests/MATRIX.md
	install -m 644 README.md CONTRIBUTING.md $(DOC)
	sed -i 's|](deploy/|](|' $(DOC)/README.md

VERSION = $(shell sed -n 's/__version__ = "\(.*\)"/\1/p' tscwatch/__init__.py)
# No file in a package has a time after the last commit's, so that each build of a commit is the same.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y pyproject.toml)

bpf: build/bpf ## compile the BPF programs for packages; as root, with bcc and kernel headers

build/bpf: $(wildcard bpf/*) tscwatch/capture/ebpf.py $(addprefix tscwatch/linux/,compiler.py kvm.py) \
		.venv/packages-run
	rm -rf $@ $@.part
	$(SYSTEM_PYTHON) -c 'from tscwatch.capture import ebpf; ebpf.precompile("$@.part")'
	mv $@.part $@

SDIST = dist/tscwatch-$(VERSION).tar.gz

dist: setup-build bpf ## make the source distribution and the wheel, in dist/
	rm -rf dist
	$(PYTHON) -m build --no-isolation

DEB = build/deb/tscwatch_$(shell dpkg-parsechangelog -l deploy/debian/changelog -S Version)_all.deb

deb: dist .venv/packages-deb ## make the Debian source package, and from it build/deb/*.deb
	rm -rf build/deb
	mkdir -p build/deb
	tar -C build/deb -xf $(SDIST)
	cp $(SDIST) build/deb/tscwatch_$(VERSION).orig.tar.gz
	cp -r deploy/debian build/deb/tscwatch-$(VERSION)/debian
	cd build/deb/tscwatch-$(VERSION) && \
		DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage -us -uc --build-profiles=nocheck

test-deb: rpm image .venv/packages-test-deb ## make all packages again, and install Debian's in clean trees
	$(PYTHON) -m tests.programs.deb

RPMBUILD = rpmbuild
# rpm 4.20 forgets macros of --load before it packs the files.
RPM_MACROS = /usr/lib/rpm/macros:/usr/lib/rpm/platform/%{_target}/macros:/usr/lib/rpm/fileattrs/*.attr

rpm: dist setup-test .venv/packages-rpm ## make the source RPM, and an RPM that checks its spec, in build/rpm/
	rm -rf build/rpm
	$(RPMBUILD) -ta --quiet --nodeps --macros '$(RPM_MACROS):tests/support/rpm.macros' \
		--define "_topdir $(abspath build/rpm)" --define "python3 $(abspath $(PYTHON))" $(SDIST)

IMAGE = build/tscwatch_$(VERSION)_oci.tar

REVISION = $(shell git rev-parse HEAD)

image: deb .venv/packages-image ## make the container image build/tscwatch_VERSION_oci.tar
	$(PYTHON) deploy/container/image.py --revision "$(REVISION)" $(DEB) $(VERSION) $(IMAGE)

test-bare: setup-test .venv/packages-test-bare ## run `make demo` in bare Debians, with /dev/kvm and without
	$(SUITE) bare-12 bare-13 bare-12-kvm bare-13-kvm

test-image: image setup-live .venv/packages-test-image ## run the image with runc beside real guests
	$(SUITE) image
