/* A sound card that takes one kind of sound only, keeps what it is given in a file, and can be busy
 * or lost: a plugin of ALSA's library (pcm_ioplug).
 *
 * pcm.NAME { type melglow_test format S16_LE channels 2 rate 48000 file "OUT" [speed N] [lose_after FRAMES] [busy 1] }
 *
 * It plays `speed` times as fast as sound (1 if not given). When it has nothing to play it waits:
 * what the file holds doesn't depend on how busy the machine is. */
#define PIC
#include <alsa/asoundlib.h>
#include <alsa/pcm_external.h>
#include <sys/timerfd.h>
#include <time.h>

typedef struct {
    snd_pcm_ioplug_t io;
    FILE *file;
    long speed, lose_after;
    /* frames that are given and played, in all; since when the next are due, seconds */
    snd_pcm_sframes_t given, played;
    double since;
} card_t;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int start(snd_pcm_ioplug_t *io) {
    ((card_t *)io->private_data)->since = now();
    return 0;
}

static int stop(snd_pcm_ioplug_t *io) {
    (void)io;
    return 0;
}

static int prepare(snd_pcm_ioplug_t *io) {
    card_t *card = io->private_data;
    card->given = card->played = 0;
    return 0;
}

static snd_pcm_sframes_t pointer(snd_pcm_ioplug_t *io) {
    card_t *card = io->private_data;
    double elapsed = now() - card->since, rate = (double)io->rate * card->speed;
    snd_pcm_sframes_t due = elapsed * rate;
    if (due > card->given - card->played) {
        due = card->given - card->played;
        card->since = now();
    } else {
        card->since += due / rate;
    }
    card->played += due;
    return card->played % io->buffer_size;
}

static snd_pcm_sframes_t transfer(snd_pcm_ioplug_t *io, const snd_pcm_channel_area_t *areas,
                                  snd_pcm_uframes_t offset, snd_pcm_uframes_t size) {
    card_t *card = io->private_data;
    size_t frame = areas->step / 8;
    if (card->lose_after && card->given >= card->lose_after) return -ENODEV;
    if (fwrite((char *)areas->addr + areas->first / 8 + offset * frame, frame, size, card->file) != size) return -EIO;
    fflush(card->file);
    card->given += size;
    return size;
}

static int revents(snd_pcm_ioplug_t *io, struct pollfd *fds, unsigned int count, unsigned short *events) {
    unsigned long long ticks;
    (void)count;
    *events = fds->revents & POLLIN && read(io->poll_fd, &ticks, sizeof ticks) > 0 ? POLLOUT : 0;
    return 0;
}

static int shut(snd_pcm_ioplug_t *io) {
    card_t *card = io->private_data;
    close(io->poll_fd);
    fclose(card->file);
    free(card);
    return 0;
}

static const snd_pcm_ioplug_callback_t callback = {.start = start, .stop = stop, .prepare = prepare,
    .pointer = pointer, .transfer = transfer, .poll_revents = revents, .close = shut};

SND_PCM_PLUGIN_DEFINE_FUNC(melglow_test) {
    const char *format = "S16_LE", *file = "/dev/null";
    long channels = 2, rate = 48000, busy = 0;
    card_t *card = calloc(1, sizeof *card);
    snd_config_iterator_t i, next;
    (void)root;
    card->speed = 1;
    snd_config_for_each(i, next, conf) {
        snd_config_t *entry = snd_config_iterator_entry(i);
        const char *id;
        snd_config_get_id(entry, &id);
        if (!strcmp(id, "format")) snd_config_get_string(entry, &format);
        if (!strcmp(id, "file")) snd_config_get_string(entry, &file);
        if (!strcmp(id, "channels")) snd_config_get_integer(entry, &channels);
        if (!strcmp(id, "rate")) snd_config_get_integer(entry, &rate);
        if (!strcmp(id, "speed")) snd_config_get_integer(entry, &card->speed);
        if (!strcmp(id, "lose_after")) snd_config_get_integer(entry, &card->lose_after);
        if (!strcmp(id, "busy")) snd_config_get_integer(entry, &busy);
    }
    card->file = busy ? NULL : fopen(file, "ab");
    if (!card->file) {
        free(card);
        return busy ? -EBUSY : -EIO;
    }
    struct itimerspec every = {{0, 1000000}, {0, 1000000}};
    card->io.version = SND_PCM_IOPLUG_VERSION;
    card->io.name = "a card of melglow's tests";
    card->io.callback = &callback;
    card->io.private_data = card;
    card->io.poll_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    card->io.poll_events = POLLIN;
    timerfd_settime(card->io.poll_fd, 0, &every, NULL);
    int err = snd_pcm_ioplug_create(&card->io, name, stream, mode);
    if (err < 0) return err;
    unsigned int access = SND_PCM_ACCESS_RW_INTERLEAVED, kind = snd_pcm_format_value(format);
    snd_pcm_ioplug_set_param_list(&card->io, SND_PCM_IOPLUG_HW_ACCESS, 1, &access);
    snd_pcm_ioplug_set_param_list(&card->io, SND_PCM_IOPLUG_HW_FORMAT, 1, &kind);
    snd_pcm_ioplug_set_param_minmax(&card->io, SND_PCM_IOPLUG_HW_CHANNELS, channels, channels);
    snd_pcm_ioplug_set_param_minmax(&card->io, SND_PCM_IOPLUG_HW_RATE, rate, rate);
    snd_pcm_ioplug_set_param_minmax(&card->io, SND_PCM_IOPLUG_HW_PERIODS, 2, 64);
    snd_pcm_ioplug_set_param_minmax(&card->io, SND_PCM_IOPLUG_HW_PERIOD_BYTES, 64, 1 << 20);
    snd_pcm_ioplug_set_param_minmax(&card->io, SND_PCM_IOPLUG_HW_BUFFER_BYTES, 128, 1 << 22);
    *pcmp = card->io.pcm;
    return 0;
}

SND_PCM_PLUGIN_SYMBOL(melglow_test);
