// SPDX-License-Identifier: Apache-2.0
//
// The init of a guest that keeps all of its devices busy and checks what they do. The
// host talks to it by streams of vsock: the first byte is a command.
//
// e: every byte that follows comes back inverted.
// g: the answer comes when everything has gone on for a while; a line of text.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#define PORT 1023
#define BLOCK 16384
#define BLOCKS 16
// How many rounds of everything are "a while".
#define ROUNDS 30
// How long that may take, in milliseconds at least.
#define PATIENCE 5000

static struct {
	unsigned long rounds[8];
	unsigned long resets;
	char error[256];
} *shared;

static void fail(const char *what)
{
	if (!shared->error[0])
		snprintf(shared->error, sizeof(shared->error), "%s (%s)", what, strerror(errno));
}

static void fill(unsigned char *block, unsigned long round)
{
	for (size_t i = 0; i < BLOCK; i++)
		block[i] = (round * 2654435761u + i * 40503u) >> 8;
}

// Writes a block of its own to an open file, and reads it back from the device.
static void check_block(int fd, unsigned long round, const char *name)
{
	static unsigned char wrote[BLOCK] __attribute__((aligned(4096)));
	static unsigned char got[BLOCK] __attribute__((aligned(4096)));
	off_t at = round % BLOCKS * BLOCK;

	fill(wrote, round);
	if (pwrite(fd, wrote, BLOCK, at) != BLOCK)
		return fail(name);
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	errno = 0;
	if (pread(fd, got, BLOCK, at) != BLOCK || memcmp(wrote, got, BLOCK))
		fail(name);
}

// One file stays open all the time, others come and go.
static int files(unsigned long round)
{
	static int fd = -1;
	int other;

	if (fd < 0)
		fd = open("/share/open", O_RDWR | O_CREAT, 0600);
	check_block(fd, round, "the open file");
	other = open("/share/new", O_RDWR | O_CREAT | O_EXCL, 0600);
	check_block(other, round, "a new file");
	close(other);
	if (rename("/share/new", "/share/renamed") || unlink("/share/renamed"))
		fail("a new file's name");
	return 1;
}

static int disk(unsigned long round)
{
	static int fd = -1;

	if (fd < 0)
		fd = open("/dev/vda", O_RDWR | O_DIRECT);
	check_block(fd, round, "the disk");
	return 1;
}

static int entropy(unsigned long round)
{
	static int fd = -1;
	unsigned char bytes[64] = "", none[64] = "";

	(void)round;
	if (fd < 0)
		fd = open("/dev/hwrng", O_RDONLY);
	if (read(fd, bytes, sizeof(bytes)) <= 0 || !memcmp(bytes, none, sizeof(bytes)))
		fail("entropy");
	return 1;
}

static unsigned short checksum(const void *bytes, size_t length)
{
	const unsigned short *word = bytes;
	unsigned sum = 0;

	for (; length > 1; length -= 2)
		sum += *word++;
	sum = (sum >> 16) + (sum & 0xffff);
	return ~(sum + (sum >> 16));
}

// Asks the host for an echo. What is lost while the machine rests is asked for again.
static int network(unsigned long round)
{
	static int fd = -1;
	struct sockaddr_in host = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x0a000001) };
	struct timeval limit = { .tv_usec = 100000 };
	struct { struct icmphdr header; unsigned char data[1024]; } ask = { 0 };
	unsigned char answer[2048];
	ssize_t got;

	if (fd < 0) {
		fd = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	}
	ask.header.type = ICMP_ECHO;
	ask.header.un.echo.id = htons(7);
	ask.header.un.echo.sequence = htons(round);
	memset(ask.data, round, sizeof(ask.data));
	ask.header.checksum = checksum(&ask, sizeof(ask));
	sendto(fd, &ask, sizeof(ask), 0, (void *)&host, sizeof(host));
	while ((got = recv(fd, answer, sizeof(answer), 0)) > 0) {
		struct icmphdr *header = (void *)(answer + sizeof(struct iphdr));

		if (header->type != ICMP_ECHOREPLY || header->un.echo.sequence != ask.header.un.echo.sequence)
			continue;
		if (got != sizeof(struct iphdr) + sizeof(ask) || memcmp(header + 1, ask.data, sizeof(ask.data)))
			fail("an echo");
		return 1;
	}
	return 0;
}

static int clocks(unsigned long round)
{
	static struct timespec last;
	struct timespec now;

	(void)round;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec))
		fail("time went back");
	if (last.tv_sec && now.tv_sec > last.tv_sec + 15)
		fail("time jumped");
	last = now;
	return 1;
}

static int (*const workers[])(unsigned long) = { files, disk, entropy, network, clocks };
static const char *const names[] = { "files stand still", "the disk stands still", "entropy stands still",
				     "the network stands still", "the clocks stand still" };
#define WORKERS (sizeof(workers) / sizeof(*workers))

static void work(unsigned worker)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(worker % get_nprocs(), &set);
	sched_setaffinity(0, sizeof(set), &set);
	for (unsigned long round = 1;; usleep(500))
		if (workers[worker](round)) {
			shared->rounds[worker]++;
			round++;
		}
}

static void serve(int stream)
{
	unsigned char bytes[4096];
	char command = 0;
	ssize_t got;

	if (read(stream, &command, 1) != 1)
		return;
	if (command == 'g') {
		unsigned long begun[WORKERS];
		char line[512];
		int length;

		memcpy(begun, shared->rounds, sizeof(begun));
		for (unsigned i = 0, waited = 0; i < WORKERS && !shared->error[0]; i++)
			while (shared->rounds[i] < begun[i] + ROUNDS && !shared->error[0]) {
				usleep(1000);
				if (waited++ == PATIENCE)
					fail(names[i]);
			}
		length = snprintf(line, sizeof(line), "%d processors, %lu resets, error: %s\n", get_nprocs(),
				  shared->resets, shared->error[0] ? shared->error : "none");
		write(stream, line, length);
		return;
	}
	while ((got = read(stream, bytes, sizeof(bytes))) > 0) {
		for (ssize_t i = 0; i < got; i++)
			bytes[i] = ~bytes[i];
		for (ssize_t at = 0, put; at < got; at += put)
			if ((put = write(stream, bytes + at, got - at)) < 0) {
				got = -1;
				break;
			}
	}
	if (got < 0)
		__sync_fetch_and_add(&shared->resets, 1);
}

static void up(void)
{
	struct ifreq request = { .ifr_name = "eth0" };
	struct sockaddr_in *address = (void *)&request.ifr_addr;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	address->sin_family = AF_INET;
	address->sin_addr.s_addr = htonl(0x0a000002);
	if (ioctl(fd, SIOCSIFADDR, &request))
		fail("the address of eth0");
	address->sin_addr.s_addr = htonl(0xffffff00);
	ioctl(fd, SIOCSIFNETMASK, &request);
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(fd, SIOCSIFFLAGS, &request))
		fail("eth0");
	close(fd);
}

int main(void)
{
	struct sockaddr_vm any = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = PORT };
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = PORT };
	int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int knock = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/share", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	if (mount("share", "/share", "virtiofs", 0, NULL))
		fail("the share");
	up();
	for (unsigned i = 0; i < WORKERS; i++)
		if (!fork())
			work(i);
	bind(listener, (void *)&any, sizeof(any));
	listen(listener, 16);
	// It is refused, and with that the host has heard.
	connect(knock, (void *)&host, sizeof(host));
	close(knock);
	for (;;) {
		int stream = accept(listener, NULL, NULL);

		if (stream >= 0 && !fork()) {
			serve(stream);
			_exit(0);
		}
		close(stream);
	}
}
