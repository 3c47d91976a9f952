/* Lets the n-th file operation under a folder fail, or end the process there.

   Preloaded (LD_PRELOAD), so that it is in the way of Python, and of what is written in Rust and C++
   (safetensors, tokenizers, Arrow) alike. It calls the kernel itself, whatever the C library does.
   `fault_arm` begins to count; until then, and for other folders, nothing is changed. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAILS_ONCE, KILLS, IS_FULL, REMOVES };
enum { KILLED = 9 };

static char root[PATH_MAX], removed[PATH_MAX];
static size_t root_length;
static long wanted;
static void (*before_each)(void);
static int what, error_number;
static atomic_long count;
static char log_text[1 << 20];
static size_t log_length;

/* Begin to count operations under `under`; the n-th (from 1) fails with `number`, kills the process,
   is the first on a full disk, or finds the folder `gone` removed. n 0: count only, and call
   `before_each`, if there is one, before each of them: what a process killed there leaves. */
void fault_arm(const char *under, long n, int how, int number, const char *gone, void (*call)(void)) {
    before_each = call;
    snprintf(removed, sizeof removed, "%s", gone);
    wanted = n, what = how, error_number = number, log_length = 0;
    atomic_store(&count, 0);
    snprintf(root, sizeof root, "%s", under);
    root_length = strlen(root);
}

long fault_disarm(void) {
    root_length = 0;
    return atomic_load(&count);
}

/* A line for each operation that was counted: its name, and the path. */
const char *fault_log(void) { return log_text; }

static int removed_one(const char *path, const struct stat *s, int flag, struct FTW *f) {
    (void)s, (void)f;
    syscall(SYS_unlinkat, AT_FDCWD, path, flag == FTW_DP ? AT_REMOVEDIR : 0);
    return 0;
}

static const char *at(int folder, const char *path, char *whole) {
    char link[64];
    if (path[0] == '/') return path;
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, whole, PATH_MAX) < 0) return path;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        long n = syscall(SYS_readlink, link, whole, PATH_MAX - 1);
        if (n < 0) return path;
        whole[n] = 0;
    }
    size_t n = strlen(whole);
    if (path[0]) snprintf(whole + n, PATH_MAX - n, "/%s", path);
    return whole;
}

/* Whether this operation is to fail; errno is set then. `half`: for a write, 1 if it is to write half
   of what it is given. */
static int fails(const char *name, int folder, const char *path, int grows, int *half) {
    static _Thread_local int inside;
    char whole[PATH_MAX];
    if (!root_length || inside) return 0;
    inside = 1;
    const char *place = at(folder, path, whole);
    int failed = 0;
    if (!strncmp(place, root, root_length)) {
        long n = atomic_fetch_add(&count, 1) + 1;
        if (!wanted) {
            size_t left = sizeof log_text - log_length;
            int used = snprintf(log_text + log_length, left, "%s %s\n", name, place + root_length);
            if (used > 0 && (size_t)used < left) log_length += (size_t)used;
            if (before_each) before_each();
        } else if (what == IS_FULL) {
            if (n == wanted && half) *half = 1;
            else if (n >= wanted && grows) errno = ENOSPC, failed = 1;
        } else if (n == wanted) {
            if (what == KILLS && half) *half = 1;
            else if (what == KILLS) _exit(KILLED);
            else if (what == REMOVES) nftw(removed, removed_one, 16, FTW_DEPTH | FTW_PHYS);
            else errno = error_number, failed = 1;
        }
    }
    inside = 0;
    return failed;
}

static int fd_fails(const char *name, int fd, int grows, int *half) {
    int before = errno;
    int failed = fails(name, fd, "", grows, half);
    if (!failed) errno = before;
    return failed;
}

#define REFUSE(...) do { if (fails(__VA_ARGS__)) return -1; } while (0)
#define REFUSE_FD(...) do { if (fd_fails(__VA_ARGS__)) return -1; } while (0)

static int opened(int folder, const char *path, int flags, mode_t mode) {
    int makes = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
    REFUSE(makes ? "create" : "open", folder, path, makes, NULL);
    return (int)syscall(SYS_openat, folder, path, flags, mode);
}

#define MODE(flags) ({ mode_t m = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list l; va_start(l, flags); m = va_arg(l, mode_t); va_end(l); } m; })

int open(const char *path, int flags, ...) { return opened(AT_FDCWD, path, flags, MODE(flags)); }
int open64(const char *path, int flags, ...) { return opened(AT_FDCWD, path, flags, MODE(flags)); }
int openat(int d, const char *path, int flags, ...) { return opened(d, path, flags, MODE(flags)); }
int openat64(int d, const char *path, int flags, ...) { return opened(d, path, flags, MODE(flags)); }

DIR *opendir(const char *path) {
    static DIR *(*usual)(const char *);
    if (!usual) *(void **)&usual = dlsym(RTLD_NEXT, "opendir");
    return fails("opendir", AT_FDCWD, path, 0, NULL) ? NULL : usual(path);
}

ssize_t write(int fd, const void *from, size_t n) {
    int half = 0;
    REFUSE_FD("write", fd, 1, &half);
    ssize_t done = syscall(SYS_write, fd, from, half ? n / 2 : n);
    if (half && what == KILLS) _exit(KILLED);
    return done;
}

ssize_t pwrite64(int fd, const void *from, size_t n, off64_t where) {
    int half = 0;
    REFUSE_FD("write", fd, 1, &half);
    ssize_t done = syscall(SYS_pwrite64, fd, from, half ? n / 2 : n, where);
    if (half && what == KILLS) _exit(KILLED);
    return done;
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t w) { return pwrite64(fd, from, n, w); }

ssize_t writev(int fd, const struct iovec *parts, int n) {
    int half = 0;
    REFUSE_FD("write", fd, 1, &half);
    ssize_t done = syscall(SYS_writev, fd, parts, half ? (n + 1) / 2 : n);
    if (half && what == KILLS) _exit(KILLED);
    return done;
}

ssize_t sendfile64(int to, int from, off64_t *where, size_t n) {
    REFUSE_FD("write", to, 1, NULL);
    return syscall(SYS_sendfile, to, from, where, n);
}
ssize_t sendfile(int to, int from, off_t *w, size_t n) { return sendfile64(to, from, w, n); }

ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags) {
    REFUSE_FD("write", to, 1, NULL);
    return syscall(SYS_copy_file_range, from, a, to, b, n, flags);
}

int fsync(int fd) { REFUSE_FD("fsync", fd, 1, NULL); return (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { REFUSE_FD("fsync", fd, 1, NULL); return (int)syscall(SYS_fdatasync, fd); }
int ftruncate64(int fd, off64_t n) {
    REFUSE_FD("truncate", fd, 1, NULL);
    return (int)syscall(SYS_ftruncate, fd, n);
}
int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }
int fchmod(int fd, mode_t m) { REFUSE_FD("chmod", fd, 0, NULL); return (int)syscall(SYS_fchmod, fd, m); }
int flock(int fd, int how) { REFUSE_FD("flock", fd, 0, NULL); return (int)syscall(SYS_flock, fd, how); }

int close(int fd) {  /* of what was written: network file systems tell then that they are full */
    long flags = root_length ? syscall(SYS_fcntl, fd, F_GETFL) : 0;
    int written = flags > 0 && (flags & O_ACCMODE) != O_RDONLY;
    int failed = written && fd_fails("close", fd, 0, NULL), number = errno;
    int done = (int)syscall(SYS_close, fd);
    if (failed) errno = number;
    return failed ? -1 : done;
}

void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t where) {
    if (fd >= 0 && fd_fails("mmap", fd, 0, NULL)) return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, protection, flags, fd, where);
}
void *mmap(void *at, size_t n, int p, int f, int fd, off_t w) { return mmap64(at, n, p, f, fd, w); }

int chmod(const char *path, mode_t m) {
    REFUSE("chmod", AT_FDCWD, path, 0, NULL);
    return (int)syscall(SYS_fchmodat, AT_FDCWD, path, m);
}
int fchmodat(int d, const char *path, mode_t m, int flags) {
    (void)flags;
    REFUSE("chmod", d, path, 0, NULL);
    return (int)syscall(SYS_fchmodat, d, path, m);
}
int mkdirat(int d, const char *path, mode_t m) {
    REFUSE("mkdir", d, path, 1, NULL);
    return (int)syscall(SYS_mkdirat, d, path, m);
}
int mkdir(const char *path, mode_t m) { return mkdirat(AT_FDCWD, path, m); }
int unlinkat(int d, const char *path, int flags) {
    REFUSE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", d, path, 0, NULL);
    return (int)syscall(SYS_unlinkat, d, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int renameat2(int d, const char *path, int e, const char *to, unsigned flags) {
    REFUSE("rename", d, path, 0, NULL);
    return (int)syscall(SYS_renameat2, d, path, e, to, flags);
}
int renameat(int d, const char *path, int e, const char *to) { return renameat2(d, path, e, to, 0); }
int rename(const char *path, const char *to) {
    return renameat2(AT_FDCWD, path, AT_FDCWD, to, 0);
}
int linkat(int d, const char *path, int e, const char *to, int flags) {
    REFUSE("link", d, path, 1, NULL);
    return (int)syscall(SYS_linkat, d, path, e, to, flags);
}
int link(const char *path, const char *to) { return linkat(AT_FDCWD, path, AT_FDCWD, to, 0); }
