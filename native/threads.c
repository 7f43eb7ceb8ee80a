/* The pool: threads.h. Workers wait on a condition variable; a job is done by whoever takes its next part. */
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

typedef struct {
    am_part *part;
    void *context;
    uint32_t parts, threads;
    uint32_t joined; /* under the lock: threads that took part, the caller included */
    atomic_uint next;
} job;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_there = PTHREAD_COND_INITIALIZER, work_left = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static job *current;        /* under the lock */
static uint32_t workers;    /* under the lock */
static uint32_t inside;     /* under the lock: workers that may touch `current` */

static void do_parts(job *all, uint32_t thread)
{
    for (;;) {
        uint32_t part = atomic_fetch_add_explicit(&all->next, 1, memory_order_relaxed);
        if (part >= all->parts)
            return;
        all->part(all->context, part, thread);
    }
}

static void *worker(void *unused)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!current || current->joined >= current->threads ||
               atomic_load_explicit(&current->next, memory_order_relaxed) >= current->parts)
            pthread_cond_wait(&work_there, &lock);
        job *mine = current;
        uint32_t thread = mine->joined++;
        inside++;
        pthread_mutex_unlock(&lock);
        do_parts(mine, thread);
        pthread_mutex_lock(&lock);
        if (--inside == 0)
            pthread_cond_signal(&work_left);
    }
    return unused;
}

/* A child has the caller's thread only. Whatever the others held is as if it had never been. */
static void forked(void)
{
    pthread_mutex_t fresh_lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t fresh = PTHREAD_COND_INITIALIZER;
    lock = fresh_lock;
    work_there = work_left = fresh;
    current = 0;
    workers = inside = 0;
}

static void prepare(void)
{
    (void)pthread_atfork(0, 0, forked);
}

uint32_t am_threads_ready(uint32_t wanted)
{
    wanted = wanted < AM_MAX_THREADS ? wanted : AM_MAX_THREADS;
    if (wanted <= 1)
        return 1;
    pthread_once(&once, prepare);
    pthread_mutex_lock(&lock);
    if (workers + 1 < wanted) {
        sigset_t all, before;
        sigfillset(&all); /* signals are for the threads that the program knows */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_t detached;
        pthread_t id;
        if (!pthread_attr_init(&detached)) {
            pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
            while (workers + 1 < wanted && !pthread_create(&id, &detached, worker, 0))
                workers++;
            pthread_attr_destroy(&detached);
        }
        pthread_sigmask(SIG_SETMASK, &before, 0);
    }
    uint32_t ready = workers + 1 < wanted ? workers + 1 : wanted;
    pthread_mutex_unlock(&lock);
    return ready;
}

void am_threads_run(am_part *part, void *context, uint32_t parts, uint32_t threads)
{
    job all = {.part = part, .context = context, .parts = parts, .threads = threads, .joined = 1};
    int shared = 0;
    if (threads > 1) {
        pthread_mutex_lock(&lock);
        if (!current) {
            current = &all;
            shared = 1;
            pthread_cond_broadcast(&work_there);
        }
        pthread_mutex_unlock(&lock);
    }
    do_parts(&all, 0);
    if (!shared)
        return;
    pthread_mutex_lock(&lock);
    all.threads = 0; /* nobody joins any more */
    while (inside)
        pthread_cond_wait(&work_left, &lock);
    current = 0;
    pthread_mutex_unlock(&lock);
}
