/*
 * Goes into the guest kernel's arch/x86/um/os-Linux/registers.c (see `kernel`).
 *
 * Linux 6.1 knows 2,696 bytes of a process's extended registers. The host refuses to set fewer than it has,
 * which are 11,008 on a processor with AMX: the guest would die as its first process starts. What Linux 6.1
 * does not know is in its initial state.
 */
#include <string.h>

static int set_xstate(int pid, struct iovec *known)
{
	static char all[1 << 16];
	static size_t size;
	struct iovec whole = { .iov_base = all, .iov_len = sizeof(all) };

	if (size == 0) {
		if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &whole) < 0)
			return -1;
		size = whole.iov_len;
		memset(all, 0, sizeof(all));
	}
	if (size <= known->iov_len)
		return ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, known);
	memcpy(all, known->iov_base, known->iov_len);
	whole.iov_len = size;
	return ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &whole);
}
