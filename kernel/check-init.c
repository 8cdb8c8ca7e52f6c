// SPDX-License-Identifier: Apache-2.0
//
// The init of check.sh's guest: tries what containers need of the kernel, prints
// a line for each thing that is missing and one for the whole.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/landlock.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <linux/netfilter_ipv6/ip6_tables.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <mqueue.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define EACH(item, ...)                                      \
	for (const char **item = (const char *[]){ __VA_ARGS__, NULL }; *item; item++)

static int tried, missing;

static void expect(int ok, const char *kind, const char *name)
{
	int error = errno;

	tried++;
	if (ok)
		return;
	missing++;
	printf("missing: %s %s (%s)\n", kind, name, strerror(error));
}

// Whether a file of at most 16 KB has this word.
static int file_has(const char *path, const char *word)
{
	char text[16384];
	int fd = open(path, O_RDONLY);
	ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	if (got < 0)
		return 0;
	text[got] = 0;
	for (char *at = strtok(text, " \t\n"); at; at = strtok(NULL, " \t\n"))
		if (!strcmp(at, word))
			return 1;
	errno = ENOENT;
	return 0;
}

static int exists(const char *format, ...)
{
	char path[256];
	va_list args;

	va_start(args, format);
	vsnprintf(path, sizeof(path), format, args);
	va_end(args);
	return access(path, F_OK) == 0;
}

static void mount_basics(void)
{
	EACH(dir, "/dev", "/proc", "/sys", "/cgroup")
		mkdir(*dir, 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	mount("cgroup", "/cgroup", "cgroup2", 0, NULL);
}

// The console appears once the VMM has answered, which may be after init starts.
static int open_console(void)
{
	char events[4096];
	int console, watch = inotify_init();

	inotify_add_watch(watch, "/dev", IN_CREATE);
	while ((console = open("/dev/hvc0", O_RDWR)) < 0)
		if (read(watch, events, sizeof(events)) < 0)
			reboot(RB_AUTOBOOT);
	close(watch);
	return console;
}

static void check_files(void)
{
	EACH(fs, "tmpfs", "overlay", "ext4", "erofs", "fuse", "virtiofs", "cgroup2", "mqueue",
	     "devpts", "hugetlbfs", "binfmt_misc", "securityfs", "bpf")
		expect(file_has("/proc/filesystems", *fs), "file system", *fs);
	EACH(ns, "cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
		expect(exists("/proc/self/ns/%s", *ns), "namespace", *ns);
	EACH(controller, "cpu", "cpuset", "io", "memory", "pids", "hugetlb", "misc")
		expect(file_has("/cgroup/cgroup.controllers", *controller), "controller", *controller);
	EACH(driver, "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtiofs",
	     "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_pmem")
		expect(exists("/sys/bus/virtio/drivers/%s", *driver), "driver", *driver);
	EACH(driver, "virtio-mmio", "vmgenid")
		expect(exists("/sys/bus/platform/drivers/%s", *driver), "driver", *driver);
	EACH(device, "fuse", "net/tun", "loop-control", "vsock", "kmsg", "ptmx", "hvc0")
		expect(exists("/dev/%s", *device), "device", *device);
	EACH(file, "pressure/memory", "config.gz", "self/smaps", "self/io",
	     "self/task/1/children")
		expect(exists("/proc/%s", *file), "/proc file", *file);
	EACH(knob, "kernel/yama/ptrace_scope", "kernel/unprivileged_bpf_disabled",
	     "net/core/bpf_jit_enable", "net/ipv6/conf/all/forwarding",
	     "net/bridge/bridge-nf-call-iptables", "net/netfilter/nf_conntrack_max")
		expect(exists("/proc/sys/%s", *knob), "sysctl", *knob);
	EACH(action, "kill_process", "errno", "user_notif", "trace", "log")
		expect(file_has("/proc/sys/kernel/seccomp/actions_avail", *action), "seccomp", *action);
}

// In a child: init has to stay in the first namespaces to end the machine.
static int can_unshare(void)
{
	int status = -1;
	pid_t child = fork();

	if (child == 0)
		_exit(unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET) ? errno : 0);
	waitpid(child, &status, 0);
	errno = WEXITSTATUS(status);
	return status == 0;
}

static void check_calls(void)
{
	struct io_uring_params ring = { 0 };
	// r0 = 1; exit
	struct bpf_insn allow[] = { { .code = BPF_ALU64 | BPF_MOV | BPF_K, .imm = 1 },
				    { .code = BPF_JMP | BPF_EXIT } };
	union bpf_attr device = { .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insn_cnt = 2,
				  .insns = (unsigned long)allow,
				  .license = (unsigned long)"GPL" };
	struct mq_attr queue = { .mq_maxmsg = 1, .mq_msgsize = 1 };

	expect(syscall(SYS_bpf, BPF_PROG_LOAD, &device, sizeof(device)) >= 0, "bpf", "cgroup/dev");
	expect(syscall(SYS_io_uring_setup, 1, &ring) >= 0, "call", "io_uring_setup");
	expect(syscall(SYS_userfaultfd, 0) >= 0, "call", "userfaultfd");
	expect(syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) > 0,
	       "call", "landlock_create_ruleset");
	expect(syscall(SYS_memfd_create, "x", 0) >= 0, "call", "memfd_create");
	expect(syscall(SYS_keyctl, 0 /* KEYCTL_GET_KEYRING_ID */, -3, 1) >= 0, "call", "keyctl");
	expect(syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 0) == 0, "call", "kcmp");
	expect(syscall(SYS_io_setup, 1, &(unsigned long){ 0 }) == 0, "call", "io_setup");
	expect(inotify_init() >= 0, "call", "inotify_init");
	expect(fanotify_init(FAN_CLASS_CONTENT, 0) >= 0, "call", "fanotify_init");
	expect(shmget(IPC_PRIVATE, 4096, 0600) >= 0, "call", "shmget");
	expect(mq_open("/x", O_CREAT | O_RDWR, 0600, &queue) >= 0, "call", "mq_open");
	expect(can_unshare(), "call", "unshare");
}

// The kernel's answer to one netlink request: 0, or the errno it refused with.
static int netlink_errno(int protocol, struct nlmsghdr *request)
{
	char answer[8192];
	struct nlmsghdr *first = (void *)answer;
	int error = 0, fd = socket(AF_NETLINK, SOCK_RAW, protocol);

	if (fd < 0)
		return errno;
	request->nlmsg_flags |= NLM_F_REQUEST | NLM_F_ACK;
	if (send(fd, request, request->nlmsg_len, 0) < 0 ||
	    recv(fd, answer, sizeof(answer), 0) < (ssize_t)sizeof(*first))
		error = errno;
	else if (first->nlmsg_type == NLMSG_ERROR)
		error = -((struct nlmsgerr *)NLMSG_DATA(first))->error;
	close(fd);
	return error;
}

static void *attribute(struct nlmsghdr *message, int type, const void *data, int size)
{
	struct nlattr *at = (void *)message + NLMSG_ALIGN(message->nlmsg_len);

	at->nla_type = type;
	at->nla_len = NLA_HDRLEN + size;
	memcpy((void *)at + NLA_HDRLEN, data, size);
	message->nlmsg_len = NLMSG_ALIGN(message->nlmsg_len) + NLA_ALIGN(at->nla_len);
	return at;
}

// A kind that the kernel knows but cannot make from a name alone is good enough.
static int knows_link(const char *kind)
{
	struct { struct nlmsghdr header; struct ifinfomsg info; char room[128]; } request = {
		.header = { .nlmsg_type = RTM_NEWLINK, .nlmsg_flags = NLM_F_CREATE | NLM_F_EXCL,
			    .nlmsg_len = NLMSG_LENGTH(sizeof(struct ifinfomsg)) },
	};
	struct nlattr *outer = attribute(&request.header, IFLA_LINKINFO, "", 0);

	attribute(&request.header, IFLA_INFO_KIND, kind, strlen(kind) + 1);
	outer->nla_len = (char *)&request + request.header.nlmsg_len - (char *)outer;
	errno = netlink_errno(NETLINK_ROUTE, &request.header);
	return errno != EOPNOTSUPP && errno != EPERM;
}

static int knows_nf_tables(int family)
{
	struct { struct nlmsghdr header; struct nfgenmsg nf; char room[64]; } request = {
		.header = { .nlmsg_type = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE,
			    .nlmsg_len = NLMSG_LENGTH(sizeof(struct nfgenmsg)) },
		.nf = { .nfgen_family = family },
	};

	attribute(&request.header, NFTA_TABLE_NAME, "x", 2);
	errno = netlink_errno(NETLINK_NETFILTER, &request.header);
	return errno == ENOENT;
}

static int knows_diag(int family)
{
	struct { struct nlmsghdr header; struct sock_diag_req diag; char room[128]; } request = {
		.header = { .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_DUMP,
			    .nlmsg_len = sizeof(request) - 72 },
		.diag = { .sdiag_family = family },
	};

	errno = netlink_errno(NETLINK_SOCK_DIAG, &request.header);
	return errno == 0;
}

static int knows_table(int family, const char *name)
{
	struct ipt_getinfo info = { 0 };
	socklen_t size = sizeof(info);
	int fd = socket(family, SOCK_RAW, IPPROTO_RAW);

	strncpy(info.name, name, sizeof(info.name) - 1);
	return getsockopt(fd, family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6, IPT_SO_GET_INFO,
			  &info, &size) == 0;
}

static int knows_extension(const char *name, int revision, int kind)
{
	struct xt_get_revision want = { .revision = revision };
	socklen_t size = sizeof(want);
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);

	strncpy(want.name, name, sizeof(want.name) - 1);
	return getsockopt(fd, IPPROTO_IP, kind, &want, &size) >= 0;
}

static void check_network(void)
{
	static const struct { const char *name; int revision; } matches[] = {
		{ "addrtype", 1 }, { "comment", 0 }, { "conntrack", 3 }, { "mark", 1 },
		{ "multiport", 1 }, { "owner", 1 }, { "physdev", 0 }, { "recent", 1 },
		{ "set", 4 }, { "state", 0 }, { "statistic", 0 }, { "limit", 0 },
	}, targets[] = {
		{ "MASQUERADE", 0 }, { "DNAT", 2 }, { "SNAT", 2 }, { "REDIRECT", 0 },
		{ "MARK", 2 }, { "REJECT", 0 }, { "LOG", 0 }, { "TCPMSS", 0 }, { "CT", 2 },
	};

	EACH(kind, "bridge", "dummy", "veth", "vlan", "macvlan", "ipvlan", "vxlan")
		expect(knows_link(*kind), "link", *kind);
	for (size_t i = 0; i < sizeof(matches) / sizeof(*matches); i++)
		expect(knows_extension(matches[i].name, matches[i].revision, IPT_SO_GET_REVISION_MATCH),
		       "iptables match", matches[i].name);
	for (size_t i = 0; i < sizeof(targets) / sizeof(*targets); i++)
		expect(knows_extension(targets[i].name, targets[i].revision, IPT_SO_GET_REVISION_TARGET),
		       "iptables target", targets[i].name);
	EACH(table, "filter", "nat", "mangle", "raw") {
		expect(knows_table(AF_INET, *table), "iptables table", *table);
		expect(knows_table(AF_INET6, *table), "ip6tables table", *table);
	}
	expect(knows_nf_tables(NFPROTO_INET), "nf_tables family", "inet");
	expect(knows_nf_tables(NFPROTO_IPV4), "nf_tables family", "ip");
	expect(knows_nf_tables(NFPROTO_IPV6), "nf_tables family", "ip6");
	expect(knows_nf_tables(NFPROTO_BRIDGE), "nf_tables family", "bridge");
	expect(knows_diag(AF_UNIX), "diag", "unix");
	expect(knows_diag(AF_INET), "diag", "inet");
	expect(socket(AF_PACKET, SOCK_RAW, 0) >= 0, "socket", "packet");
	expect(socket(AF_VSOCK, SOCK_STREAM, 0) >= 0, "socket", "vsock");
	expect(socket(AF_INET6, SOCK_STREAM, 0) >= 0, "socket", "inet6");
}

// The number behind a name that begins a line of this file; 0 where there is none.
static size_t number_in(const char *path, const char *name)
{
	char line[128];
	size_t number = 0, length = strlen(name);
	FILE *file = fopen(path, "r");

	while (file && fgets(line, sizeof(line), file))
		if (!strncmp(line, name, length))
			number = strtoul(line + length, NULL, 10);
	if (file)
		fclose(file);
	return number;
}

// What the page allocator has at hand, in bytes: without memory that is not initialised yet.
static size_t at_hand(void)
{
	return number_in("/proc/vmstat", "nr_free_pages ") * 4096;
}

// All memory is shown, little of it is initialised, and what is used later is good.
static void check_growth(void)
{
	const size_t mib = 1 << 20;
	size_t bad = 0, first = at_hand();
	struct sysinfo before;
	int compact = open("/proc/sys/vm/compact_memory", O_WRONLY);

	sysinfo(&before);
	expect(before.totalram > 220 * mib && before.freeram > 180 * mib, "memory", "all shown");
	expect(first && first < 64 * mib, "memory", "little initialised");
	expect(write(compact, "1", 1) == 1 && at_hand() < 64 * mib, "memory", "compaction at first");
	int block = open("/sys/devices/system/memory/memory1/state", O_WRONLY);
	expect(write(block, "offline", 7) < 0 && errno == EBUSY, "memory", "refusal to go offline");
	close(block);

	size_t total = before.freeram - 32 * mib;
	char *memory = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (size_t at = 0; memory != MAP_FAILED && at < total; at += 4096)
		*(size_t *)(memory + at) = at;
	for (size_t at = 0; memory != MAP_FAILED && at < total; at += 4096)
		bad += *(size_t *)(memory + at) != at;
	expect(memory != MAP_FAILED && !bad, "memory", "contents");
	munmap(memory, total);
	// Each processor keeps some of what is freed for itself.
	expect(at_hand() > total / 4 * 3, "memory", "initialised by use");
	expect(write(compact, "1", 1) == 1, "memory", "compaction at last");
	close(compact);
}

// Where page tables are kept apart, little else is mapped in small pages: two blocks of 2 MiB, and the odd end of memory.
static void check_tables(void)
{
	size_t small = number_in("/proc/meminfo", "DirectMap4k:");

	if (file_has("/proc/pagetypeinfo", "PageTable"))
		expect(small > 0 && small <= 6144, "memory", "mapped in large pages");
}

// getpid by its 32-bit number and gate: the kernel runs 32-bit programs.
static void check_32bit(void)
{
	long pid = 20;

	asm volatile("int $0x80" : "+a"(pid) : : "memory", "r8", "r9", "r10", "r11");
	expect(pid == getpid(), "32-bit", "programs");
}

int main(void)
{
	struct timespec start;

	clock_gettime(CLOCK_MONOTONIC, &start);
	mount_basics();
	dup2(open_console(), STDOUT_FILENO);
	setvbuf(stdout, NULL, _IOLBF, 0);

	check_files();
	check_network();
	check_tables();
	check_growth();
	if (getenv("CHECK_32BIT"))
		check_32bit();
	check_calls();
	printf("checked: %d tried, %d missing, init after %ld ms\n", tried, missing,
	       start.tv_sec * 1000 + start.tv_nsec / 1000000);
	tcdrain(STDOUT_FILENO);
	reboot(RB_AUTOBOOT);
}
